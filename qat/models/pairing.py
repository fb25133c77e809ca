"""A student's model and a larger teacher: they must mean the same by every token id.

A student learns what its teacher predicts id by id, so a pair is refused where one id is two tokens, and where texts
are split or end otherwise. One head may have more rows than the other: behind the tokenizer's last token rows stand for
no text. A teacher's further rows are not loaded, so its probabilities are those of the student's vocabulary; where the
student alone has a row, the teacher finds it impossible (`qat.head`), so the student pays for what it spends there.
"""

import hashlib
import logging
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat import model_files
from qat.artifacts import content_key
from qat.config import ModelConfig
from qat.errors import ConfigError
from qat.models import tokenizers
from qat.models.folder import ModelFolder
from qat.models.sources import locate

log = logging.getLogger(__name__)

SHOWN = 3  # differing tokens that a refusal lists
# Text on which tokenizers of one vocabulary would differ: numbers, blanks, cases, scripts, code, what is composed
PROBES = (
    "The year 2024 had 31,622,400 seconds; 007 and 3.14159 are numbers too.",
    "  two blanks,\ttabs\t\tand\n\n\nlines  \r\n end here   ",
    "I'LL say it's DON'T-care, we've CamelCase and snake_case words…",
    "Größe naïve cafe\u0301 Ελλάδα Москва 北京大学 かな 한국어 עברית العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦 ½ ﬁ № ™ \u200b\u00a0 €",
    "def f(x):\n    return {'a': [x**2, -x], \"b\": x != 0}  # https://example.com/?q=1&r=2",
)


def pair(model: ModelConfig, teacher: ModelConfig | None, artifacts: Path) -> tuple[ModelFolder, ModelFolder]:
    """The model that is quantized and its teacher, which is itself where none is configured.

    Raises:
        MissingError: one cannot be had.
        ConfigError: one is no model, or the two do not have the same tokens.
    """
    student = locate(model, artifacts)
    return student, student if teacher is None else teaching(student, locate(teacher, artifacts))


def teaching(model: ModelFolder, teacher: ModelFolder) -> ModelFolder:
    """The teacher of another model, speaking as that is spoken to: where chat templates differ, by the model's.

    Raises:
        ConfigError: the two do not have the same tokens; the sentence lists the first that differ.
    """
    if model.fingerprint == teacher.fingerprint:
        return model
    both = f"model={model.name} and teacher={teacher.name}"
    for one in (model, teacher):
        if not one.has_tokenizer():
            raise ConfigError(f"{one.path} has no tokenizer, so nothing tells whether {both} have the same tokens")
    own, theirs = model.tokenizer(), teacher.tokenizer()
    _refuse_tokens(both, own, theirs)
    for one, tokenizer in ((model, own), (teacher, theirs)):
        tokenizers.check(one.path, tokenizer, one.vocab_size())
    _refuse_splits(both, own, theirs)
    if (ends := model.ends()) != (other := teacher.ends()):
        raise ConfigError(
            f"{both} end texts with different tokens, {_named(own, ends)} and {_named(theirs, other)}:"
            " choose a teacher of the same kind (both made for chats, or neither)"
        )
    if (further := teacher.vocab_size() - model.vocab_size()) > 0:
        log.info("%s: the last %s rows of the teacher's head stand for no text and are left out", both, f"{further:,}")
    teacher = fitted(model, teacher)
    if own.chat_template == theirs.chat_template:
        return teacher
    log.warning("the chat templates of %s differ: text is made by that of %s", both, model.name)
    return replace(teacher, spoken=model.path, text=_spoken(model))


def fitted(model: ModelFolder, teacher: ModelFolder) -> ModelFolder:
    """A teacher with no more rows in embedding and head than its student's model has; other weights to every key."""
    rows = model.vocab_size()
    if teacher.vocab_size() <= rows:
        return teacher
    return replace(teacher, rows=rows, fingerprint=content_key({"model": teacher.fingerprint, "rows": rows}))


def _refuse_tokens(both: str, *tokenizers: PreTrainedTokenizerBase) -> None:
    """Refuses ids that are not the same token in both."""
    own, theirs = ({id: token for token, id in one.get_vocab().items()} for one in tokenizers)
    differing = [id for id in sorted(own.keys() | theirs.keys()) if own.get(id) != theirs.get(id)]
    if differing:
        listed = ", ".join(f"{id} is {_shown(own.get(id))} and {_shown(theirs.get(id))}" for id in differing[:SHOWN])
        more = f", and {len(differing) - SHOWN:,} more" if len(differing) > SHOWN else ""
        raise ConfigError(f"{both} have different tokens ({listed}{more}): choose a teacher of the same family")


def _refuse_splits(both: str, *tokenizers: PreTrainedTokenizerBase) -> None:
    """Refuses tokenizers of one vocabulary that make other tokens of a text."""
    for probe in PROBES:
        own, theirs = (one.tokenize(probe) for one in tokenizers)
        for at, (first, second) in enumerate(zip_longest(own, theirs)):
            if first != second:
                raise ConfigError(
                    f"{both} have the same tokens and split text otherwise (token {at} of {probe!r} is"
                    f" {_shown(first)} and {_shown(second)}): choose a teacher of the same family"
                )


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _named(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> str:
    return " ".join(f"{end} ({_shown(str(tokenizer.convert_ids_to_tokens(end)))})" for end in ends) or "none"


def _spoken(model: ModelFolder) -> str:
    """Identifies the files of a tokenizer and its template."""
    whole = hashlib.sha256()
    for path in model_files.text(model.path):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]
