"""Text as it lies in files: rows, passages and prompts, each with its place, before any tokenizer sees it."""

import hashlib
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qat.config import DataConfig, DataSource, Start
from qat.data import conversations, files
from qat.data.files import ROWS, TextFile, suffix
from qat.data.passages import Passage, passages
from qat.data.reading import PIECE, check, lines
from qat.data.rows import Rows, rows
from qat.data.tally import EARLY, Tally, Unusable
from qat.errors import QatError


@dataclass(frozen=True)
class Form:
    """How text of a source lies in its files.

    Attributes:
        endings: of files in a folder or a hub data set that are read.
        read: what is in a file that does not hold rows by its name, each piece with its place.
    """

    endings: tuple[str, ...]
    read: Callable[[TextFile], Rows]


TEXT = Form((".txt", *ROWS), passages)
FORMS = {
    DataSource.selfgen: TEXT,
    DataSource.alpaca: Form(ROWS, rows),
    DataSource.chat_jsonl: Form(ROWS, rows),
    DataSource.text: TEXT,
}


def prompts(data: DataConfig) -> list[str]:
    """The questions that the teacher answers: of `data.path`, one a line or a row, or the project's own.

    Raises:
        ConfigError: there are none.
    """
    if not data.path:
        return [line.strip() for line in _own_prompts() if _is_prompt(line)]
    tally = Tally.of(data)
    found = list(tally.usable(_of_files(data, _prompt_lines), _prompt))
    tally.settle()
    return found


def some_prompts(data: DataConfig, count: int) -> list[str]:
    """The first of these questions; none where their files are not on this computer."""
    if not data.path:
        return prompts(data)[:count]
    try:
        return list(islice(Tally.of(data).usable(_of_files(data, _prompt_lines), _prompt), count))
    except QatError:
        return []


def found(data: DataConfig) -> Rows:
    """What is in the files of a source: rows that should hold a conversation or a text, and passages."""
    return _of_files(data, FORMS[data.source].read)


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source text, so that an edited file is a different data set."""
    if data.source is DataSource.selfgen and data.start is not Start.openings and not data.path:
        own = "\n".join(_own_prompts()) if data.start is Start.prompts else ""
        return hashlib.sha256(own.encode()).hexdigest()
    return files.content_hash(data, FORMS[data.source].endings)


def look(data: DataConfig) -> None:
    """Reads how the files of a source begin, so that others are refused before there is any work.

    Raises:
        QatError: in one sentence, why they are not what the source reads.
    """
    pieces, make = _kind(data)
    tally = Tally.of(data)
    for _ in tally.usable(islice(pieces, EARLY), make):
        return
    tally.ended = tally.rows < EARLY
    tally.check()


def _kind(data: DataConfig) -> tuple[Rows, Callable[[Any], Any]]:
    """What is in the files of a source, and what takes a document out of it."""
    if data.source is DataSource.selfgen and data.start is Start.prompts:
        return _of_files(data, _prompt_lines), _prompt
    if data.source in (DataSource.alpaca, DataSource.chat_jsonl):
        return found(data), lambda row: [conversations.conversation(row)]
    return found(data), lambda piece: [passage(piece)]


def passage(piece: dict[str, Any] | Passage) -> Passage:
    """A passage, or the text of a row as one.

    Raises:
        Unusable: the row has none.
    """
    return piece if isinstance(piece, Passage) else Passage(conversations.text(piece))


def _own_prompts() -> list[str]:
    return importlib.resources.files("qat.data").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def _is_prompt(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _prompt(found: str | dict[str, Any]) -> list[str]:
    asked = found if isinstance(found, str) else conversations.question(found)
    check(asked)
    if len(asked) > PIECE:
        raise Unusable(f"a prompt longer than {PIECE:,} characters")
    return [asked.strip()] if asked.strip() else []


def _prompt_lines(file: TextFile) -> Rows:
    return ((file.place(f"line {number}"), line) for number, line in lines(file) if _is_prompt(line))


def _of_files(data: DataConfig, read: Callable[[TextFile], Rows]) -> Rows:
    """What is in the files of a source: rows where a file's name says so, else as `read` finds it."""
    for file in files.find(data, FORMS[data.source].endings):
        yield from rows(file) if suffix(file.name) in ROWS else read(file)
