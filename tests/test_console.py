"""What a person sees while work goes on."""

import logging
import re
import time

import pytest

from qat import console
from qat.console import Harmless, duration, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves on."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


@pytest.fixture
def screen(monkeypatch, tmp_path):
    """Replaces the console by one that writes into a file, on a terminal or not."""
    files = []

    def make(terminal):
        files.append(open(tmp_path / f"{len(files)}", "w+"))  # noqa: SIM115 - closed below
        monkeypatch.setattr(console, "console", Harmless(file=files[-1], force_terminal=terminal, width=120))
        return files[-1]

    yield make
    for file in files:
        file.close()


def shown(file):
    file.seek(0)
    return file.read()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (12.3, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (2 * 3600 + 51 * 60 + 59, "2 h 51 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_say_how_far_how_fast_and_how_long(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with progress("teacher outputs", 10_000, "tokens") as advance:
        clock.now += 20
        advance(2_500, "all well")
    assert caplog.messages[0] == "teacher outputs: 2,500/10,000 tokens, 125/s, ETA 1 min 00 s, all well"


def test_rate_is_that_of_all_work_so_far(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with progress("work", 100, "steps") as advance:
        for _ in range(4):
            clock.now += 10
            advance(5)
    assert caplog.messages[3] == "work: 20/100 steps, 0.5/s, ETA 2 min 40 s"


def test_plain_lines_keep_ten_seconds_apart(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with progress("work", 1000, "steps") as advance:
        for _ in range(35):
            clock.now += 1
            advance()
    assert [message.split("/")[0] for message in caplog.messages[:-1]] == ["work: 10", "work: 20", "work: 30"]


def test_first_eta_is_that_of_an_earlier_run(clock, screen, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console, "paces", console.Paces())
    console.paces.begin({"distillation": 2.0})
    screen(terminal=False)
    with progress("distillation", 100, "steps") as advance:
        clock.now += 20
        advance(100)
    assert caplog.messages == ["distillation: 100 steps, ETA 50 s by the last run", "distillation: 100 steps in 20 s"]
    assert console.paces.now == {"distillation": 5.0}
    monkeypatch.undo()
    file = screen(terminal=True)
    console.paces.begin({"distillation": 2.0})
    with progress("distillation", 100, "steps"):
        pass
    console.paces.begin({})
    assert "ETA ~0:00:50" in shown(file)


def test_work_that_goes_on_is_counted_from_where_it_stopped(clock, screen, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console, "paces", console.Paces())
    console.paces.begin({"distillation": 0.5})
    screen(terminal=False)
    with progress("distillation", 100, "steps", there=60) as advance:
        clock.now += 20
        advance(10)
    assert caplog.messages == [
        "distillation: 60/100 steps, ETA 1 min 20 s by the last run",
        "distillation: 70/100 steps, 0.5/s, ETA 1 min 00 s",
        "distillation: 10 of 100 steps in 20 s",
    ]
    assert console.paces.now == {"distillation": 0.5}


def test_bar_of_work_that_goes_on_has_the_rate_of_what_is_left(clock, screen, monkeypatch):
    monkeypatch.setattr(console, "paces", console.Paces())
    console.paces.begin({"distillation": 0.5})
    file = screen(terminal=True)
    with progress("distillation", 100, "steps", there=60) as advance:
        pass
    assert "60/100" in shown(file) and "ETA ~0:01:20" in shown(file)
    console.paces.begin({})
    file = screen(terminal=True)
    with progress("distillation", 100, "steps", there=60) as advance:
        for _ in range(3):
            clock.now += 40  # more than rich's own 30 seconds, after which it forgets the step before
            advance()
    assert "63/100" in shown(file) and "0.025/s" in shown(file) and "ETA 0:24:40" in shown(file)


def test_no_pace_of_a_record_breaks_a_run():
    made = console.Paces()
    made.begin({"work": 1e-300, **{str(number): 2.0 for number in range(1_000)}})
    assert made.guess("work", 5) is None and made.guess("0", 5) == 2.5 and made.guess("none", 5) is None
    assert len(made.earlier) == console.KINDS


def test_lines_and_bars_can_be_read_at_eighty_columns(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    note = "loss 0.100, held-out 0.117"
    with progress("distillation", 12_800, "steps") as advance:
        clock.now += 500
        advance(1_200, note)
    assert caplog.messages[0] == f"distillation: 1,200/12,800, 2.4/s, ETA 1 h 20 min, {note}"
    assert len(caplog.messages[0]) <= 80


@pytest.mark.parametrize(
    ("what", "total", "note"),
    [("distillation", 12_800, "loss 0.100, held-out 0.117"), ("teacher outputs", 64_000_000, "")],
)
def test_bar_cuts_nothing_off_at_eighty_columns(monkeypatch, tmp_path, what, total, note):
    with open(tmp_path / "screen", "w+") as file:
        monkeypatch.setattr(console, "console", Harmless(file=file, force_terminal=True, width=80))
        with progress(what, total, "tokens") as advance:
            for _ in range(4):
                time.sleep(0.01)
                advance(total // 8, note)
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(file)))
    last = [line for line in lines if line.startswith(what)][-1]
    assert "…" not in last and len(last) <= 80
    assert f"{total // 2:,}/{total:,}" in last and "/s ETA 0:00:0" in last and last.rstrip().endswith(note or "0:00:01")


def test_table_wider_than_the_console_comes_in_parts(monkeypatch, tmp_path):
    header = ["run", "train.lr", "quant.bits", "full KL", "loss", "KD loss", "perplexity", "held-out text", "status"]
    rows = [[f"SR-{number:03d}", *[f"{number}.{column}" for column in range(7)], "complete"] for number in range(3)]
    with open(tmp_path / "screen", "w+") as file:
        monkeypatch.setattr(console, "console", Harmless(file=file, width=80))
        console.table("sweep-001", header, rows)
        text = shown(file)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in header) and text.count("SR-002") == 2
    assert all(cell in text for row in rows for cell in row)


def test_quick_work_is_one_line_at_its_end(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with progress("work", 3, "steps") as advance:
        for _ in range(3):
            clock.now += 1.5
            advance()
    assert caplog.messages == ["work: 3 steps in 4.5 s"]


def test_last_unit_is_not_said_twice(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with progress("work", 2, "steps") as advance:
        for _ in range(2):
            clock.now += 30
            advance()
    assert [message.split(",")[0] for message in caplog.messages] == ["work: 1/2 steps", "work: 2 steps in 1 min 00 s"]


def test_work_that_fails_is_not_said_to_be_done(clock, screen, caplog):
    caplog.set_level(logging.INFO)
    screen(terminal=False)
    with pytest.raises(ValueError), progress("work", 2, "steps"):
        raise ValueError
    assert caplog.messages == []


def test_nothing_moves_the_cursor_when_not_a_terminal(clock, screen):
    file = screen(terminal=False)
    with progress("work", 2, "steps") as advance:
        clock.now += 30
        advance()
    assert shown(file) == ""


def test_terminal_gets_a_bar_with_count_rate_eta_and_note(screen, caplog):
    caplog.set_level(logging.INFO)
    file = screen(terminal=True)
    with progress("work", 5, "steps") as advance:
        for _ in range(4):
            advance(1, "loss 1.5")
    text = shown(file)
    for part in ("work", "4/5", "/s", "ETA", "loss 1.5", "\x1b["):
        assert part in text
    assert [message.split(" in ")[0] for message in caplog.messages] == ["work: 4 steps"]


def test_table_shows_title_header_and_every_cell_as_written(capsys):
    console.table("[bold] results", ["", "before"], [["KD loss", "0.5"], ["runs[/x]", "1"]])
    text = capsys.readouterr().out
    for part in ("[bold] results", "before", "KD loss", "0.5", "runs[/x]"):
        assert part in text
