"""Marks of a chat template: where the template writes them they steer the model, where people write them they are text.

Without this a question about `<|im_end|>` would end the user's turn. Marks in what was said are put between two
characters that no text has before a template is rendered, and what stands between these is taken for text after that.
Text is cut here as well, where it is so long that a tokenizer, which needs some hundred bytes a token, would take more
memory than the model.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qat.data.conversations import Messages
from qat.data.reading import PIECE, check
from qat.data.tally import Unusable

LONGEST = 256  # longest mark, in characters
# Marks that an assistant may write, even if the tokenizer does not list them as special.
THINKING = ("<think>", "</think>")
# Private-use characters around a mark that is plain text; removed from all input.
OPEN, CLOSE = "\U000f0000", "\U000f0001"


def of(tokenizer: PreTrainedTokenizerBase) -> "Marks":
    """Those of a tokenizer and the template that it has now."""
    return _of(tokenizer, str(tokenizer.chat_template or ""))


def holds_hidden(text: str) -> bool:
    """Whether a text has marks in it that are text."""
    return OPEN in text and CLOSE in text


def shown(text: str) -> str:
    """A text as it was before its marks were hidden."""
    return text.replace(OPEN, "").replace(CLOSE, "")


class Marks:
    """The marks of one tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in known if token.special}
        written = {token.content for token in known if not token.content.isspace() and token.content in template}
        self._all = _any_of(special | written)
        self._whole = re.compile(f"{OPEN}?(?:{self._all.pattern}){CLOSE}?")
        # An assistant's thoughts and calls are in its words the same marks as in the template's.
        self._answers = _any_of(special.difference(THINKING))
        added = _any_of(set(tokenizer.added_tokens_encoder)).pattern
        self._between = re.compile(f"{OPEN}({added}){CLOSE}|[{OPEN}{CLOSE}]")  # a lone one parts what is around it

    def hide(self, said: Any, role: str = "user") -> Any:
        """What somebody said, a text or an object of texts, its marks told apart from the template's."""
        marks = self._answers if role == "assistant" else self._all
        return _hidden(said, marks) if _holds(said, marks) else said

    def hidden(self, messages: Messages) -> Messages:
        """Messages with the marks in them told apart from the template's."""
        return [self.hide(message, message["role"]) for message in messages]

    def pieces(self, text: str) -> Iterator[str]:
        """A text in pieces of at most `PIECE` characters, cut between words where there are any, never in a mark."""
        begin = 0
        while len(text) - begin > PIECE:
            end = self._cut(text, begin + PIECE)
            yield text[begin:end]
            begin = end
        yield text[begin:]

    def tokens(self, piece: str) -> list[int]:
        """Token ids of a text, of which what is hidden is text and all else may be marks.

        Raises:
            Unusable: the tokenizer has no way to take a mark for text, or the text is damaged.
        """
        check(piece)
        if not holds_hidden(piece):
            return list(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
        ids: list[int] = []
        for place, part in enumerate(self._between.split(piece)):
            if part:  # every second part is a mark that is plain text
                ids += self._as_text(part) if place % 2 else _continued(self._encoded, part, first=not ids)
        return ids

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _as_text(self, mark: str) -> list[int]:
        """A mark's tokens as those of any other text.

        Raises:
            Unusable: the tokenizer has no way to that.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        ids = [] if backend is None else _continued(partial(_plain, backend), mark)
        if not ids or self._tokenizer.convert_tokens_to_ids(mark) in ids:
            reason = f"{mark!r} is a piece of text to it like any other"
            raise Unusable("marks that this tokenizer cannot take for text", reason, damaged=False)
        return ids

    def _cut(self, text: str, end: int) -> int:
        space = max(text.rfind(sign, end - PIECE // 2, end) for sign in (" ", "\n"))
        end = space if space > 0 else end
        around = self._whole.finditer(text, end - LONGEST, end + LONGEST)
        return next((match.start() for match in around if match.start() < end < match.end()), end)


@lru_cache(maxsize=4)
def _of(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    return Marks(tokenizer, template)


def _any_of(marks: set[str]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _hidden(said: Any, marks: re.Pattern[str]) -> Any:
    """What was said with every mark in it, but not in names of values, between `OPEN` and `CLOSE`."""
    if isinstance(said, str):
        return marks.sub(f"{OPEN}\\g<0>{CLOSE}", shown(said))
    if isinstance(said, dict):
        return {key: _hidden(value, marks) for key, value in said.items()}
    return [_hidden(value, marks) for value in said] if isinstance(said, list | tuple) else said


def _plain(backend: Tokenizer, text: str) -> list[int]:
    """Token ids by the tokenizer's model alone, which knows of no added tokens."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _continued(encode: Callable[[str], list[int]], text: str, first: bool = False) -> list[int]:
    """Token ids of a text within another: after a line break, as SentencePiece puts a space before what comes first."""
    if first:
        return encode(text)
    begun, ids = encode("\n"), encode("\n" + text)
    return ids[len(begun) :] if ids[: len(begun)] == begun else encode(text)


def _holds(said: Any, marks: re.Pattern[str]) -> bool:
    """Whether any text in an object has one of the marks."""
    if isinstance(said, str):
        return marks.search(said) is not None
    if isinstance(said, dict):
        return any(_holds(value, marks) for value in said.values())
    return isinstance(said, list) and any(_holds(value, marks) for value in said)
