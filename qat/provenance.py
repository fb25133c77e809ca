"""When, where and in how many seconds an artifact was made, so that whoever uses it again can say so.

What outlives its process is made in several goes; their times add up. A go that was killed counts up to the
last file that it wrote.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qat import system
from qat.console import duration

UNKNOWN = "made before that was recorded"
NOTE = ".time"  # file in an unfinished artifact: seconds spent in earlier attempts


@contextmanager
def clocked(folder: Path) -> Iterator[Callable[[], float]]:
    """Gives a clock that tells the seconds of all goes so far at what is made in a folder.

    A note in the folder keeps them for the next go.
    """
    note, earlier, began = folder / NOTE, _spent(folder), time.monotonic()

    def clock() -> float:
        return earlier + time.monotonic() - began

    note.write_text(json.dumps({"seconds": earlier, "since": time.time()}), encoding="utf-8")
    try:
        yield clock
    finally:
        with suppress(OSError):  # a full disk is reported by the work that it stops
            note.write_text(json.dumps({"seconds": clock()}), encoding="utf-8")


def made(seconds: float, place: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of its making; `place` is what only the maker knows, as `Machine.place`."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"at": at, "seconds": round(seconds, 3), "cores": system.cores(), "machine": platform.machine(), **place}


def told(made: dict[str, Any] | None) -> str:
    """`made 2026-11-28 14:03 in 2 min 18 s on cpu, bfloat16, 2 cores`."""
    if not made:
        return UNKNOWN
    at, seconds = str(made.get("at", "")), made.get("seconds")
    words = ["made", at[:16].replace("T", " ")]
    words += ["in", duration(seconds)] if isinstance(seconds, int | float) and seconds >= 0 else []
    where = [str(made["device"])] if made.get("device") else []
    where += [f"{made['cores']} cores"] if made.get("cores") else []
    return " ".join([*words, *(["on", ", ".join(where)] if where else [])])


def _spent(folder: Path) -> float:
    """Seconds of earlier goes at what lies in a folder; none where they are not known."""
    try:
        said = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        seconds, since = float(said["seconds"]), said.get("since")
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
    newest = max((path.stat().st_mtime for path in folder.rglob("*") if path.name != NOTE), default=0.0)
    return seconds + (max(0.0, newest - since) if isinstance(since, float) else 0.0)
