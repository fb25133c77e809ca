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
from qat.data.reading import PIECE, check, lines
from qat.data.rows import Rows, rows
from qat.data.tally import EARLY, Tally, Unusable

PASSAGE = 1 << 20  # characters that are held of a text without a blank line


@dataclass(frozen=True)
class Passage:
    """Some text of a file, or the part of it that is held; `ends` where nothing follows."""

    text: str
    ends: bool = True


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


def turns(data: DataConfig) -> Rows:
    """Rows that should hold conversations, or questions with answers."""
    return _of_files(data, rows)


def passages(data: DataConfig) -> Rows:
    """Passages of plain text, and rows that should hold a text."""
    return _of_files(data, _passages)


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source text, so that an edited file is a different data set."""
    if data.source is DataSource.selfgen and data.start is not Start.openings and not data.path:
        own = "\n".join(_own_prompts()) if data.start is Start.prompts else ""
        return hashlib.sha256(own.encode()).hexdigest()
    return files.content_hash(data)


def look(data: DataConfig) -> None:
    """Reads how the files of a source begin, so that others are refused before there is any work.

    Raises:
        QatError: in one sentence, why they are not what the source reads.
    """
    found, make = _kind(data)
    tally = Tally.of(data)
    for _ in tally.usable(islice(found, EARLY), make):
        return
    tally.ended = tally.rows < EARLY
    tally.check()


def _kind(data: DataConfig) -> tuple[Rows, Callable[[Any], Any]]:
    """What is in the files of a source, and what takes a document out of it."""
    if data.source is DataSource.selfgen and data.start is Start.prompts:
        return _of_files(data, _prompt_lines), _prompt
    if data.source in (DataSource.selfgen, DataSource.text):
        return passages(data), lambda found: [passage(found)]
    return turns(data), lambda row: [conversations.conversation(row)]


def passage(found: dict[str, Any] | Passage) -> Passage:
    """A passage, or the text of a row as one.

    Raises:
        Unusable: the row has none.
    """
    return found if isinstance(found, Passage) else Passage(conversations.text(found))


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
    for file in files.find(data):
        yield from rows(file) if suffix(file.name) in ROWS else read(file)


def _passages(file: TextFile) -> Rows:
    """What blank lines separate, in parts where more than `PASSAGE` characters would be held."""
    held: list[str] = []
    begin = size = 0
    for number, piece in lines(file, PASSAGE):
        blank = not piece.strip()
        if held and (blank or size >= PASSAGE):
            yield file.place(f"line {begin}"), _passage("".join(held), blank)
            held, size = [], 0
        if not blank:
            begin = begin if held else number
            held.append(piece)
            size += len(piece)
    if held:
        yield file.place(f"line {begin}"), _passage("".join(held), True)


def _passage(text: str, ends: bool) -> Passage | Unusable:
    try:
        check(text)
    except Unusable as unusable:
        return unusable
    if "\0" in text:
        remedy = "if this is UTF-16, convert it, as `iconv -f utf-16le -t utf-8` does"
        return Unusable("NUL bytes, which no text has", remedy=remedy)
    return Passage(text.strip(), ends)
