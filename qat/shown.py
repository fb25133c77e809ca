"""Makes other people's text safe to show: control characters and direction marks are written as escapes.

Names come from archives, stores and records, and whoever named them may have put in escape sequences, carriage
returns or marks that reverse the direction of text. Terminal, log files, Markdown and pages all pass through here.
"""

import logging
import re
import shutil
import sys
from pathlib import Path

from rich.cells import cell_len

INDENT = "  "  # before the further lines of a message
_PIECE = re.compile(r"(?:`[^`]*`|\S)+")  # a word, or a command in backticks with what stands at it
_STEERING = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that set the direction of text
    "\u2028\u2029"  # line and paragraph separators
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible characters: byte order mark, annotations, tags
    "\ud800-\udfff"  # surrogates, which UTF-8 cannot encode
    "]"
)


def shown(text: str) -> str:
    r"""The text with invisible control characters written as escapes, such as `\x1b` and `\u202e`."""
    return _STEERING.sub(lambda found: _written(ord(found[0])), text)


def line(text: str) -> str:
    """The same on one line."""
    return shown(" ".join(text.split()))


def near(path: str | Path) -> str:
    """A path as it is written from the current folder, where it lies below it."""
    whole, here = Path(path).absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def wrapped(text: str, width: int, label: str = "", whole: str = "") -> str:
    """The text behind a label in lines of at most `width` columns, the others below the first.

    A command in backticks, a path and what is `whole`, which may be either with spaces in it, stay as they are to be
    copied: on a line of their own where none has room.
    """
    indents, line, lines = (" " * (cell_len(label) or len(INDENT)), INDENT, ""), label, list[str]()
    for piece in [*_PIECE.findall(text), *([whole] if whole else [])]:
        longer = line + piece if line == label else f"{line} {piece}"
        if line and cell_len(longer) > width:
            lines.append(line.rstrip())
            longer = next((indent for indent in indents if len(indent) + cell_len(piece) <= width), "") + piece
        line = longer
    return "\n".join([*lines, line])


class Formatter(logging.Formatter):
    """Messages of the log, which name files and folders of others."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return shown(super().format(record))


class Screen(Formatter):
    """The same on standard output, in lines that fit where that is a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = super().format(record)
        if record.exc_info or not sys.stdout.isatty():
            return text
        width = shutil.get_terminal_size().columns
        return "\n".join(wrapped(line, width) if cell_len(line) > width else line for line in text.split("\n"))


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class LogFile(logging.FileHandler):
    """The log of a run, which does without a line where the disk has no room for it: what needs room says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Tells of any other error, as logging does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
