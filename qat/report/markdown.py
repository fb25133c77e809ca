"""What the run log is written in: one-line texts and tables of Markdown that show just what they are given."""

import re

NOTHING = "–"


def plain(text: str) -> str:
    """Someone's words as one line of Markdown that shows just these words."""
    special = re.compile(r"[\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w)")
    return special.sub(r"\\\g<0>", " ".join(text.split()))


def code(text: str) -> str:
    """Text in one line of code, whatever backticks it holds."""
    text = " ".join(text.split())
    if not text:
        return ""
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table whose first and last columns are words, the others figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
