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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.artifacts import Artifact, obtain
from qat.config import DataConfig, DataSource, as_plain
from qat.data import mix, selfgen, sources
from qat.errors import ArtifactError, ConfigError
from qat.machine import Machine
from qat.models import ModelFolder

FILE = "documents.jsonl"
SPLITS = ("train", "eval")
DECODED = 512  # documents turned into text at once


@dataclass(frozen=True)
class Document:
    """One text as token ids, end marker included. `origin` is what its split is decided by."""

    origin: str
    tokens: list[int]

    def split(self, eval_fraction: float) -> str:
        """`eval` for the given share of origins, else `train`."""
        return "eval" if held_apart(hashlib.sha256(self.origin.encode()).digest(), eval_fraction) else "train"


def held_apart(digest: bytes, fraction: float) -> bool:
    """True for the given share of hashes."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def obtain_documents(data: DataConfig, teacher: ModelFolder, seed: int, machine: Machine, artifacts: Path) -> Artifact:
    """The configured text as an artifact: one JSON object a document, with its split.

    Raises:
        ConfigError: the source cannot be read, or one of the splits would be empty.
    """

    chosen = mix.parts(data)

    def make(folder: Path) -> dict[str, Any]:
        weights = [part.weight for part in data.parts] or [1.0]
        with ExitStack() as stack:  # what is written ahead ends with the mixture
            texts = [stack.enter_context(closing(_pairs(part, teacher, seed, machine, folder))) for part in chosen]
            streams: list[mix.Pairs] = [
                itertools.islice(text, _limit(part)) for text, part in zip(texts, chosen, strict=True)
            ]
            pairs = itertools.islice(mix.interleave(streams, weights), data.documents if data.parts else None)
            described = _write(folder, (Document(*pair) for pair in pairs), data, teacher.tokenizer())
        for path in folder.glob(f"*{selfgen.ANSWERS}*"):  # half-written ones of a killed run as well
            path.unlink()
        return described

    generated = any(part.source is DataSource.selfgen for part in chosen)
    inputs = {
        "data": _shape(as_plain(data)),
        "content": _content(chosen),
        "tokenizer": teacher.fingerprint,
        "seed": seed if generated else None,
    }
    return obtain(artifacts, "documents", data.name, inputs, make, resumable=generated, at=machine.place())


def _pairs(
    data: DataConfig, teacher: ModelFolder, seed: int, machine: Machine, folder: Path
) -> Generator[tuple[str, list[int]], None, None]:
    if data.source is DataSource.selfgen:
        return selfgen.answer(teacher, data, seed, machine, folder)
    return sources.render(data, teacher.tokenizer())


def _limit(data: DataConfig) -> int | None:
    """Documents taken of a source; for selfgen the number of prompts is limited instead."""
    return None if data.source is DataSource.selfgen else data.documents


def _content(chosen: list[DataConfig]) -> Any:
    hashes = [sources.content_hash(part) for part in chosen]
    return hashes[0] if len(hashes) == 1 else hashes


def _shape(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings that shape the text: its content is hashed, wherever it lies and whatever it is called."""
    kept = {key: value for key, value in plain.items() if key not in ("name", "path", "seed")}
    return kept | {"parts": [{key: value for key, value in part.items() if key != "path"} for part in plain["parts"]]}


def _write(
    folder: Path, documents: Iterable[Document], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    counts = dict.fromkeys(SPLITS, 0)
    tokens = dict.fromkeys(SPLITS, 0)
    with open(folder / FILE, "w", encoding="utf-8") as file:
        for document, text in _decoded(documents, tokenizer):
            split = document.split(data.eval_fraction)
            counts[split] += 1
            tokens[split] += len(document.tokens)
            row = {"origin": document.origin, "split": split, "tokens": document.tokens, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for split in SPLITS:
        if not counts[split]:
            raise ConfigError(
                f"data={data.name} has no document for the {split} split ({sum(counts.values())} in all):"
                " give more text or change data.eval_fraction"
            )
    return {"documents": counts, "tokens": tokens}


def _decoded(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Document, str]]:
    """Documents with their text, many in one call, which leaves Python to the threads that have more written."""
    remaining = iter(documents)
    while some := list(itertools.islice(remaining, DECODED)):
        decoded = tokenizer.backend_tokenizer.decode_batch([d.tokens for d in some], skip_special_tokens=False)
        yield from zip(some, decoded, strict=True)


def read_documents(artifact: Artifact, split: str) -> Iterator[Document]:
    """The documents of one split, in the order they were written."""
    path = artifact.folder / FILE
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["split"] == split:
                    yield Document(row["origin"], row["tokens"])
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read ({error}): delete {artifact.folder} and run again") from None
