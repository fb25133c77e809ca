"""Other people's words are seen and do nothing, wherever they are shown."""

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat import suggest
from qat.console import Harmless, table
from qat.report import markdown
from qat.shown import Formatter, LogFile, Screen, line, shown, wrapped

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


WANDB = "wandb kept this run offline; to send it, `wandb login` (--host=URL for one of your own), then"


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        (("short and done", 20), "short and done"),
        (("a longer one of words", 12), "a longer one\n  of words"),
        (("to go on: `qat stage=chat x` and so on", 20), "to go on:\n  `qat stage=chat x`\n  and so on"),
        (("it is a/path/that/no/line/has/room/for here", 16), "it is\na/path/that/no/line/has/room/for\n  here"),
        (("of this and of that", 14, "time  "), "time  of this\n      and of\n      that"),
        (("", 30, "samples  ", "out of here/samples.md"), "samples\n  out of here/samples.md"),
        (("", 40, "samples  ", "out of here/samples.md"), "samples  out of here/samples.md"),
        (("", 12, "samples  ", "out of here/samples.md"), "samples\nout of here/samples.md"),
        (("", 12, "", "out of here/samples.md"), "out of here/samples.md"),
        (("in", 12, "", "a b"), "in a b"),
        (("量子化 模型 done", 14), "量子化 模型\n  done"),  # two columns a character
        (("模型 模型", 9, "教師 "), "教師 模型\n     模型"),
    ],
)
def test_lines_fit_and_what_is_to_be_copied_stays_whole(said, fits):
    assert wrapped(*said) == fits


def test_the_log_fits_a_terminal_and_nothing_else_is_cut(monkeypatch):
    told = f"{WANDB} `wandb sync outputs/SR-001/wandb/offline-run-20261130_040000-a1b2c3d4`"
    record = logging.LogRecord("qat", logging.INFO, "", 0, told, (), None)
    assert Screen().format(record) == told
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    lines = Screen().format(record).split("\n")
    assert all(len(line) <= 80 for line in lines) and "".join(lines).replace(" ", "") == told.replace(" ", "")
    assert lines[-1] == "  `wandb sync outputs/SR-001/wandb/offline-run-20261130_040000-a1b2c3d4`"


def test_an_error_is_one_line_and_fits_a_terminal(monkeypatch, capsys):
    suggest.one_line(ValueError("a word " * 20))
    assert capsys.readouterr().err == "error: " + " ".join(["a word"] * 20) + "\n"
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    suggest.one_line(ValueError("a word " * 20))
    lines = screen.getvalue().splitlines()
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)
    assert " ".join(screen.getvalue().split()) == "error: " + " ".join(["a word"] * 20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_log_does_without_lines_for_which_there_is_no_room(capfd):
    log = logging.Logger("full")
    log.addHandler(LogFile("/dev/full"))
    log.info("a line")
    assert capfd.readouterr() == ("", "")
