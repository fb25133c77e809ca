"""Plain text to passages: what blank lines separate, never more of it held than a passage is long."""

from dataclasses import dataclass

from qat.data.files import TextFile
from qat.data.reading import check, lines
from qat.data.rows import Rows
from qat.data.tally import Unusable

PASSAGE = 1 << 20  # characters of a text without blank lines that are held at one time


@dataclass(frozen=True)
class Passage:
    """Some text of a file, or the part of it that is held; `ends` where nothing follows."""

    text: str
    ends: bool = True


def passages(file: TextFile) -> Rows:
    """What blank lines separate, in parts where more than `PASSAGE` characters would be held."""
    held: list[str] = []
    begin = size = 0
    for number, piece in lines(file, PASSAGE):
        blank = not piece.strip()
        if held and (blank or size >= PASSAGE):
            yield file.place(f"line {begin}"), passage_of("".join(held), blank)
            held, size = [], 0
        if not blank:
            begin = begin if held else number
            held.append(piece)
            size += len(piece)
    if held:
        yield file.place(f"line {begin}"), passage_of("".join(held), True)


def passage_of(text: str, ends: bool = True) -> Passage | Unusable:
    """Text without blanks around it, or why it is none."""
    try:
        check(text)
    except Unusable as unusable:
        return unusable
    if "\0" in text:
        remedy = "if this is UTF-16, convert it, as `iconv -f utf-16le -t utf-8` does"
        return Unusable("NUL bytes, which no text has", remedy=remedy)
    return Passage(text.strip(), ends)
