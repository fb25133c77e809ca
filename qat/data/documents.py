"""Documents: tokenized texts, split into training and evaluation before anything else is done.

The split is decided by a hash of what the document *is* (for a conversation its first question), so
it is the same in every cache of the same data, and two answers to one question never end on both
sides.
"""

import hashlib
import itertools
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.artifacts import Artifact, obtain
from qat.config import DataConfig, DataSource
from qat.data import mix, selfgen, sources, texts
from qat.data.tally import Tally
from qat.data.turns import Spans
from qat.errors import ArtifactError, ConfigError
from qat.machine import Machine
from qat.models import ModelFolder
from qat.shaping import shaping

FILE = "documents.jsonl"
SPLITS = ("train", "eval")
DECODED, DECODED_TOKENS = 512, 1 << 18  # limits of a batch that is decoded to text: documents, tokens
READING = 2  # version of the rules that turn files into documents; part of the key, as other rules give other text


@dataclass(frozen=True)
class Document:
    """One text as token ids, end marker included.

    Attributes:
        origin: what its split is decided by.
        tokens: the text.
        answers: where answers lie among the tokens, where that was asked for.
    """

    origin: str
    tokens: list[int]
    answers: Spans = field(default_factory=list)

    def split(self, eval_fraction: float) -> str:
        """`eval` for the given share of origins, else `train`."""
        return "eval" if held_apart(hashlib.sha256(self.origin.encode()).digest(), eval_fraction) else "train"


def held_apart(digest: bytes, fraction: float) -> bool:
    """True for the given share of hashes."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def obtain_documents(
    data: DataConfig, teacher: ModelFolder, seed: int, machine: Machine, artifacts: Path, answers: bool = False
) -> Artifact:
    """The configured text as an artifact: one JSON object a document, with its split.

    With `answers` it is of conversations, and says which of their tokens are answers.

    Raises:
        ConfigError: the source cannot be read, or one of the splits would be empty or without answers.
    """

    chosen = mix.parts(data)
    counted = [(part, Tally.of(part)) for part in chosen]

    def make(folder: Path) -> dict[str, Any]:
        weights = [part.weight for part in data.parts] or [1.0]
        with ExitStack() as stack:  # what is written ahead ends with the mixture
            written = [
                stack.enter_context(closing(_texts(part, teacher, seed, machine, folder, tally, answers)))
                for part, tally in counted
            ]
            streams: list[mix.Texts] = [
                itertools.islice(text, _limit(part)) for text, part in zip(written, chosen, strict=True)
            ]
            found = itertools.islice(mix.interleave(streams, weights), data.documents if data.parts else None)
            documents = _decoded((Document(*text) for text in found), teacher.tokenizer())
            described = _write(folder / FILE, documents, data.eval_fraction, answers)
        for path in folder.glob(f"*{selfgen.ANSWERS}*"):  # half-written ones of a killed run as well
            path.unlink()
        described |= _settled([tally for part, tally in counted if part.source is not DataSource.selfgen])
        _check_splits(folder / FILE, described["documents"], data)
        _check_answers(described.get("answers"), data)
        return described

    generated = any(part.source is DataSource.selfgen for part in chosen)
    inputs = {
        "data": _shape(shaping(data)),
        "content": _content(chosen),
        "tokenizer": teacher.fingerprint + teacher.text,
        "seed": seed if generated else None,
    }
    if any(part.path or part.repo for part in chosen):
        inputs["reading"] = READING
    if generated and (ends := teacher.ends()) != (teacher.tokenizer().eos_token_id,):
        inputs["ends"] = list(ends)
    if answers:
        inputs["answers"] = sorted(teacher.ends())
    return obtain(artifacts, "documents", data.name, inputs, make, resumable=generated, at=machine.place())


def _texts(
    data: DataConfig, teacher: ModelFolder, seed: int, machine: Machine, folder: Path, tally: Tally, answers: bool
) -> Generator[tuple[Any, ...], None, None]:
    if answers:
        return sources.answered(data, teacher.tokenizer(), tally, teacher.ends())
    if data.source is DataSource.selfgen:
        return selfgen.answer(teacher, data, seed, machine, folder)
    return sources.render(data, teacher.tokenizer(), tally)


def _settled(tallies: list[Tally]) -> dict[str, Any]:
    """What was left out of the sources that were read, and how answers in them begin, for the manifest."""
    for tally in tallies:
        tally.settle()
    left_out = [{"rows": tally.rows, "left_out": tally.counts()} for tally in tallies if tally.left_out]
    turns = [{"answers": t.turns.answers, "differing": t.turns.differing} for t in tallies if t.turns.answers]
    return {**({"read": left_out} if left_out else {}), **({"turns": turns} if turns else {})}


def _limit(data: DataConfig) -> int | None:
    """Documents taken of a source; for selfgen the number of prompts is limited instead."""
    return None if data.source is DataSource.selfgen else data.documents


def _content(chosen: list[DataConfig]) -> Any:
    hashes = [texts.content_hash(part) for part in chosen]
    return hashes[0] if len(hashes) == 1 else hashes


def _shape(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings that shape the text: its content is hashed, wherever it lies and whatever it is called."""
    kept = {key: value for key, value in plain.items() if key not in ("name", "path", "seed")}
    return kept | {"parts": [{key: value for key, value in part.items() if key != "path"} for part in plain["parts"]]}


def _write(
    path: Path, documents: Iterable[tuple[Document, str]], eval_fraction: float, answers: bool
) -> dict[str, Any]:
    counts, tokens, answered = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    with open(path, "w", encoding="utf-8") as file:
        for document, text in documents:
            split = document.split(eval_fraction)
            counts[split] += 1
            tokens[split] += len(document.tokens)
            answered[split] += sum(end - begin for begin, end in document.answers)
            row = {"origin": document.origin, "split": split, "tokens": document.tokens, "text": text}
            row |= {"answers": document.answers} if answers else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"documents": counts, "tokens": tokens, **({"answers": answered} if answers else {})}


def _check_splits(path: Path, counts: dict[str, int], data: DataConfig) -> None:
    """Refuses a text of which one split would be empty, and says how to fill it."""
    empty = next((split for split in SPLITS if not counts[split]), None)
    if empty is None:
        return
    with open(path, encoding="utf-8") as file:
        shares = {_share(json.loads(line)["origin"]) for line in file}
    said = f"data={data.name} has no document for the {empty} split ({sum(counts.values())} in all)"
    if len(shares) < 2:
        raise ConfigError(f"{said}: {_advice(data)}")
    below, above = sorted(shares)[:2] if empty == "eval" else sorted(shares)[-2:]
    between = (round((below + above) / 2, digits) for digits in range(1, 18))
    shortest = next(fraction for fraction in between if below < fraction <= above)
    raise ConfigError(f"{said}: give more text or set data.eval_fraction={shortest}")


def _check_answers(tokens: dict[str, int] | None, data: DataConfig) -> None:
    """Refuses conversations of which one split has no answer that begins as a chat would let it."""
    empty = next((split for split in SPLITS if not tokens[split]), None) if tokens else None
    if empty is not None:
        raise ConfigError(
            f"data={data.name} has no answer in the {empty} split that follows the tokens of a chat, so there is none"
            " to learn from: give more conversations, or another data.thinking"
        )


def _advice(data: DataConfig) -> str:
    """Advice on how to get documents with more different origins, by which the split is decided."""
    if data.source.plain:
        return "give more text; blank lines separate documents"
    if data.source is DataSource.selfgen:
        return "have the teacher write more, with data.documents, or longer texts, with data.answer_tokens"
    return "give conversations with other questions; those with one question stay together"


def _share(origin: str) -> float:
    """The fraction from which on documents of this origin are held apart."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:8]) / 2**64


def _decoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, str]]:
    """Documents with their text, many in one call, which leaves Python to the threads that have more written."""
    for some in _batches(documents):
        decoded = tokenizer.backend_tokenizer.decode_batch([d.tokens for d in some], skip_special_tokens=False)
        yield from zip(some, decoded, strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    some: list[Document] = []
    tokens = 0
    for document in documents:
        some.append(document)
        tokens += len(document.tokens)
        if len(some) == DECODED or tokens >= DECODED_TOKENS:
            yield some
            some, tokens = [], 0
    if some:
        yield some


def read_documents(artifact: Artifact, split: str) -> Iterator[Document]:
    """The documents of one split, in the order they were written."""
    path = artifact.folder / FILE
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["split"] == split:
                    yield Document(row["origin"], row["tokens"], row.get("answers", []))
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read ({error}): delete {artifact.folder} and run again") from None
