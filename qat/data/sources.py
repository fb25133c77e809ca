"""Text that already exists: prompts, questions and answers, conversations, plain text; streamed, never held whole."""

import hashlib
import importlib.resources
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig, DataSource, Start
from qat.data import conversations, files, marks
from qat.data.files import ROWS, TextFile, suffix
from qat.data.marks import PIECE
from qat.data.reading import check, lines
from qat.data.rows import Rows, rows
from qat.data.tally import Tally, Unusable
from qat.data.thinking import renderings

Pairs = Generator[tuple[str, list[int]], None, None]

ORIGIN = 200  # characters of a text that its side is decided by
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


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source text, so that an edited file is a different data set."""
    if data.source is DataSource.selfgen and data.start is not Start.openings and not data.path:
        own = "\n".join(_own_prompts()) if data.start is Start.prompts else ""
        return hashlib.sha256(own.encode()).hexdigest()
    return files.content_hash(data)


def render(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Pairs:
    """Origin and tokens of every document of an existing text; what is not one is counted."""
    if data.source is DataSource.text:
        yield from plain(data, tokenizer, tally, [int(tokenizer.eos_token_id)])
        return
    hiding = marks.of(tokenizer)

    def made(row: dict[str, Any]) -> Pairs:
        said = conversations.conversation(row)
        for text in renderings(tokenizer, said, data.thinking):
            for piece in hiding.pieces(text):
                yield said.question[:PIECE], hiding.tokens(piece)

    yield from tally.usable(_of_files(data, rows), made)


def plain(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally, end: list[int] | None = None) -> Pairs:
    """Origin and tokens of every document of plain text; a text that is long is several, the last one with `end`."""
    hiding = marks.of(tokenizer)

    def made(found: dict[str, Any] | Passage) -> Pairs:
        passage = found if isinstance(found, Passage) else Passage(conversations.text(found))
        pieces = list(hiding.pieces(hiding.hide(passage.text)))
        for number, piece in enumerate(pieces, 1):
            last = passage.ends and number == len(pieces)
            yield hiding.shown(piece)[:ORIGIN], hiding.tokens(piece) + (end or [] if last else [])

    yield from tally.usable(_of_files(data, _passages), made)


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
    return ((f"{file.name} line {number}", line) for number, line in lines(file) if _is_prompt(line))


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
            yield f"{file.name} line {begin}", _passage("".join(held), blank)
            held, size = [], 0
        if not blank:
            begin = begin if held else number
            held.append(piece)
            size += len(piece)
    if held:
        yield f"{file.name} line {begin}", _passage("".join(held), True)


def _passage(text: str, ends: bool) -> Passage | Unusable:
    try:
        check(text)
    except Unusable as unusable:
        return unusable
    if "\0" in text:
        remedy = "if this is UTF-16, convert it, as `iconv -f utf-16le -t utf-8` does"
        return Unusable("NUL bytes, which no text has", remedy=remedy)
    return Passage(text.strip(), ends)
