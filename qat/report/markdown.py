"""What the run log is written in: one-line texts and tables of Markdown that show just what they are given."""

import re

from qat import shown

NOTHING = "–"

_SPECIAL = re.compile(r"[\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w)")
_PIPE = re.compile(r"(?<!\\)\|")


def plain(text: str) -> str:
    """Someone's words as one line of Markdown that shows just these words."""
    return _SPECIAL.sub(r"\\\g<0>", shown.line(text))


def code(text: str) -> str:
    """Text in one line of code, whatever backticks it holds."""
    text = shown.line(text)
    if not text:
        return ""
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table whose first and last columns are words, the others figures; cells are Markdown on one line."""
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A table cell with its pipes escaped, since a pipe ends a cell even within code."""
    return _PIPE.sub(r"\|", text)
