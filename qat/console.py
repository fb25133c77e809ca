"""Progress display: a bar on a terminal, plain lines anywhere else."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from qat.processes import place
from qat.shown import shown, wrapped

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # seconds between two progress lines where there is no terminal
LONGEST_GUESS = 1e8  # seconds, three years; what a record says beyond that is no pace
KINDS = 100  # maximum kinds of work whose pace is taken from a record
LINE = 80  # columns that a progress line should not exceed
SHORTEST_BAR = 6  # columns
LONGEST_NAME = 30  # columns of what is done, beside a bar
RATE_SECONDS = 600.0  # seconds of which a bar's rate is the mean; a step on a slow machine may take a minute
WAITING_SECONDS = 30.0  # seconds between two lines that say what the process is waiting for


class Harmless(Console):
    """A console on which text is text, whoever wrote it: no markup, no sequences for the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Every text that is printed, cells of tables too, comes by here."""
        return super().render_str(shown(text), **how)

    def say(self, text: str, label: str = "", whole: str = "", style: str | None = None) -> None:
        """Prints a line, on a terminal as `qat.shown.wrapped` has it."""
        fits = wrapped(text, self.width, label, whole) if self.is_terminal else label + f"{text} {whole}".strip()
        self.print(fits, style=style, soft_wrap=True)


# Only the first of the processes that train together prints.
console = Harmless(highlight=False, markup=False, emoji=False, quiet=not place().first)


class Paces:
    """Units a second of each kind of work that is shown.

    Attributes:
        earlier: of a run like this one, before there is a rate of its own.
        now: of this run, as far as its work is done.
    """

    def __init__(self) -> None:
        self.earlier: dict[str, float] = {}
        self.now: dict[str, float] = {}

    def begin(self, earlier: dict[str, float]) -> None:
        """Forgets the last run of this process."""
        self.earlier, self.now = dict(islice(earlier.items(), KINDS)), {}

    def guess(self, what: str, total: float) -> float | None:
        """Seconds that `total` units take at the earlier run's pace; None where that says nothing."""
        pace = self.earlier.get(what)
        return total / pace if pace and total < LONGEST_GUESS * pace else None

    def known(self) -> dict[str, float]:
        """What the next run may begin with: of work that this run found done, the earlier one's."""
        return self.earlier | self.now


paces = Paces()


class Advance(Protocol):
    """Reports `amount` further units done; `note` is shown beside the rate."""

    def __call__(self, amount: float = 1, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: float, unit: str, there: float = 0) -> Iterator[Advance]:
    """Shows the progress of `what`, its rate and the remaining time.

    Args:
        what: the work, in a word or two.
        total: units in all.
        unit: what is counted, in the plural.
        there: units that were done before, at which the count begins; rate and time are of the others.
    """
    bar = _bar(what, total, there) if console.is_terminal else _lines(what, total, unit, there)
    started = time.monotonic()
    done = 0.0
    with bar as advance:

        def count(amount: float = 1, note: str = "") -> None:
            nonlocal done
            done += amount
            advance(amount, note)

        try:
            yield count
        finally:  # whoever has enough of a generator's work ends it early
            seconds = time.monotonic() - started
            if done and seconds:
                paces.now[what] = done / seconds
    of = f" of {_count(total)}" if there else ""
    log.info("%s: %s%s %s in %s", what, _count(done), of, unit, duration(seconds))


class _Rate(ProgressColumn):
    """Units a second, once there is such a rate."""

    def render(self, task: Task) -> Text:
        """`178/s`."""
        speed = task.finished_speed or task.speed
        return Text(f"{_count(speed)}/s" if speed else "")


class _Remaining(ProgressColumn):
    """The remaining time, as long as there is no rate yet that of an earlier run."""

    def render(self, task: Task) -> Text:
        """`ETA 0:03:10`, `ETA ~0:03:10` by an earlier run."""
        seconds, about = task.time_remaining, ""
        if seconds is None and (guess := paces.guess(task.description, task.fields["left"])):
            seconds, about = guess - (task.elapsed or 0.0), "~"
        if seconds is None or seconds < 0:
            return Text("ETA -:--:--")
        return Text(f"ETA {about}{timedelta(seconds=round(seconds))}")


@contextmanager
def _bar(what: str, total: float, there: float) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=LONGEST_NAME)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=SHORTEST_BAR)),
        TextColumn("{task.fields[far]}", table_column=Column(no_wrap=True)),
        _Rate(table_column=Column(no_wrap=True)),
        _Remaining(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
    )
    settings: dict[str, Any] = {"speed_estimate_period": RATE_SECONDS, "get_time": time.monotonic}
    with Progress(*columns, console=console, transient=True, expand=True, **settings) as bar:
        fields: dict[str, Any] = {"left": total - there, "far": f"{_count(there)}/{_count(total)}", "note": ""}
        task = bar.add_task(what, total=total, **fields)
        bar.tasks[0].completed = there  # here, as work that was done before has no rate

        def advance(amount: float = 1, note: str = "") -> None:
            far = f"{_count(bar.tasks[0].completed + amount)}/{_count(total)}"
            bar.update(task, advance=amount, far=far, note=note)

        yield advance


@contextmanager
def _lines(what: str, total: float, unit: str, there: float) -> Iterator[Advance]:
    started = said = time.monotonic()
    done = there
    if (guess := paces.guess(what, total - there)) and guess > PLAIN_SECONDS:
        far = f"{_count(there)}/" if there else ""
        log.info("%s: %s%s %s, ETA %s by the last run", what, far, _count(total), unit, duration(guess))

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal done, said
        done += amount
        now = time.monotonic()
        if now - said < PLAIN_SECONDS or done >= total:
            return
        said, rate = now, (done - there) / (now - started)
        log.info("%s", _line(what, f"{_count(done)}/{_count(total)}", unit, rate, (total - done) / rate, note))

    yield advance


def _line(what: str, far: str, unit: str, rate: float, eta: float, note: str) -> str:
    """How far, how fast, how long and what there is to note; without the unit where a line would be too long."""
    rest = ", ".join(filter(None, (f"{_count(rate)}/s", f"ETA {duration(eta)}", note)))
    line = f"{what}: {far} {unit}, {rest}"
    return line if len(line) <= LINE else f"{what}: {far}, {rest}"


@contextmanager
def waiting(why: str) -> Iterator[Callable[[], None]]:
    """Shows what the process waits for inside this context; calls of the yielded function update the time."""
    started = said = time.monotonic()
    log.info("waiting: %s", why)

    def still() -> None:
        nonlocal said
        now = time.monotonic()
        if status:
            status.update(Text(shown(f"waiting for {duration(now - started)}: {why}")))
        elif now - said >= WAITING_SECONDS:
            said = now
            log.info("waiting for %s: %s", duration(now - started), why)

    status = console.status(Text(shown(f"waiting: {why}"))) if console.is_terminal else None
    with status or nullcontext():
        yield still


def table(title: str, header: list[str], rows: list[list[str]], words: bool = False) -> None:
    """Prints a table, first column left, the others right, as figures are; with `words` all left and on one line.

    One of figures that is wider than the console is printed in parts, each with the first column.
    """
    if title:  # printed apart: rich would wrap a title at the width of the table
        console.say(title, style="bold")
    widths = [max(cell_len(line[index]) for line in (header, *rows)) for index in range(len(header))]
    for part in [range(1, len(header))] if words else _parts(widths, console.width):
        grid = Table()
        for index in (0, *part):
            left = index == 0 or words
            grid.add_column(header[index], justify="left" if left else "right", no_wrap=left)
        for row in rows:
            grid.add_row(*(row[index] for index in (0, *part)))
        console.print(grid)


def facts(said: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Prints what there is to say by name, in two columns; then paths and commands, which stay whole."""
    for name, text in said.items():
        console.say(text, label=f"{name:17} ")
    for name, whole in places.items():
        console.say("", label=f"{name:17} ", whole=whole)


def _parts(widths: list[int], room: int) -> Iterator[range]:
    """The columns after the first in parts that fit beside it, each with its borders; at least one column a part."""
    frame, begin, taken = widths[0] + 4, 1, 0
    for index in range(1, len(widths)):
        if index > begin and frame + taken + widths[index] + 3 > room:
            yield range(begin, index)
            begin, taken = index, 0
        taken += widths[index] + 3
    yield range(begin, len(widths))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 51 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as `12 kB`, `3.4 MB`, `16 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"
