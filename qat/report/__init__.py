"""What all runs below one outputs folder come to: the run log and the report.

    log.py       RUNS.md, the run log
    page.py      report.html, one self-contained page, put together from page.html, page.css and page.js

Both files are generated from what the runs left and hold no moment of generation, so deleting and making
them again gives the same bytes.
"""

from collections.abc import Callable
from pathlib import Path

from qat.artifacts import locked, write_text


def generate(path: Path, render: Callable[[], str]) -> Path:
    """Writes one of them, atomically; processes take turns, so that the last has seen what all of them left."""
    with locked(path):
        write_text(path, render())
    return path
