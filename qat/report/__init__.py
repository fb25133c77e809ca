"""The run log and the report of all runs in one outputs folder.

    log.py       RUNS.md, the run log; looks.py what made no student, a line each
    times.py     how long conversions took, for both
    page.py      report.html, one self-contained page, put together from page.html, page.css and page.js

Both files are generated from what the runs left and hold no moment of generation, so deleting and making
them again gives the same bytes.
"""

from collections.abc import Callable
from pathlib import Path

from qat.artifacts import locked, write_text


def generate(path: Path, render: Callable[[], str]) -> Path:
    """Writes one of the two files atomically, one process at a time, so that the last one includes all runs."""
    with locked(path):
        write_text(path, render())
    return path
