"""Progress display: a bar on a terminal, plain lines anywhere else."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from qat.processes import place
from qat.shown import shown

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # seconds between two progress lines where there is no terminal
WAITING_SECONDS = 30.0  # seconds between two lines that say what the process is waiting for


class Harmless(Console):
    """A console on which text is text, whoever wrote it: no markup, no sequences for the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Every text that is printed, cells of tables too, comes by here."""
        return super().render_str(shown(text), **how)


# Only the first of the processes that train together prints.
console = Harmless(highlight=False, markup=False, emoji=False, quiet=not place().first)


class Advance(Protocol):
    """Reports `amount` further units done; `note` is shown beside the rate."""

    def __call__(self, amount: float = 1, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: float, unit: str) -> Iterator[Advance]:
    """Shows the progress of `what`, its rate and the remaining time.

    Args:
        what: the work, in a word or two.
        total: units in all.
        unit: what is counted, in the plural.
    """
    bar = _bar(what, total, unit) if console.is_terminal else _lines(what, total, unit)
    started = time.monotonic()
    done = 0.0
    with bar as advance:

        def count(amount: float = 1, note: str = "") -> None:
            nonlocal done
            done += amount
            advance(amount, note)

        yield count
    log.info("%s: %s %s in %s", what, _count(done), unit, duration(time.monotonic() - started))


@contextmanager
def _bar(what: str, total: float, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="", note="")

        def advance(amount: float = 1, note: str = "") -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, advance=amount, rate=f"{_count(speed)} {unit}/s" if speed else "", note=note)

        yield advance


@contextmanager
def _lines(what: str, total: float, unit: str) -> Iterator[Advance]:
    started = said = time.monotonic()
    done = 0.0

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal done, said
        done += amount
        now = time.monotonic()
        if now - said < PLAIN_SECONDS or done >= total:
            return
        said, rate = now, done / (now - started)
        eta = duration((total - done) / rate)
        log.info("%s: %s/%s %s, %s/s, ETA %s %s", what, _count(done), _count(total), unit, _count(rate), eta, note)

    yield advance


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
    """Prints a table, first column left, the others right, as figures are; with `words` all left and on one line."""
    if title:  # printed apart: rich would wrap a title at the width of the table
        console.print(title, style="bold", soft_wrap=True)
    grid = Table()
    for index, name in enumerate(header):
        left = index == 0 or words
        grid.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


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
