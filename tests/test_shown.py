"""Other people's words are seen and do nothing, wherever they are shown."""

import io
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat import suggest
from qat.console import Harmless, table
from qat.report import markdown
from qat.shown import Formatter, line, shown

STEERING = {
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil\x1b\\",
    "C1": "\x9b2J",
    "return": "\rgood",
    "backspace": "\b\b",
    "direction": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "line": "a\u2028b",
    "tag": "\U000e0041",
    "surrogate": "\udce9",
    "null": "\0",
}


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_what_steers_is_written_out(text, capsys):
    said = io.StringIO()
    console = Harmless(file=said, markup=False, highlight=False, emoji=False, width=200, force_terminal=True)
    console.print(f"<{text}> [bold] :smile:", soft_wrap=True)
    suggest.one_line(ValueError(text))
    record = logging.LogRecord("qat", logging.WARNING, "f", 1, "%s", (text,), None)
    page = [markdown.plain(text), markdown.code(text), Formatter("%(message)s").format(record), line(text)]
    seen = [said.getvalue(), capsys.readouterr().err, *page]
    for words in seen:
        assert not set(text) & set(words) - set("".join(re.findall(r"[\x20-\x7e]", text))) - {"\n"}
        words.encode()
    assert "[bold] :smile:" in said.getvalue()


def test_cells_of_a_table_are_shown_too(capsys, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("qat.console.console", Harmless(file=said, markup=False, width=200))
    table("\x1b[1m", ["\x1b[2m"], [["\x1b[3m"]])
    assert "\x1b" not in said.getvalue() and said.getvalue().count(r"\x1b") == 3


@given(st.text(max_size=40))
def test_markdown_shows_just_the_words(text):
    for written in (markdown.plain(text), markdown.code(text)):
        assert "\n" not in written and shown(written) == written
    cells = markdown.table(("a", "b"), [[markdown.plain(text), markdown.code(text)]]).splitlines()
    assert len(cells) == 3 and len(re.findall(r"(?<!\\)\|", cells[2])) == 3


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=20))
def test_ordinary_words_are_left_alone(text):
    assert shown(text) == text
    assert shown("a\tb\nc\u200d") == "a\tb\nc\u200d"
