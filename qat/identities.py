"""The identity of a run, and where runs lie.

A run is `SR-007`: claimed once below its outputs folder, never reused, also when several start in the same
second. Most runs lie there or in a sweep; of one with a folder of its own (`hydra.run.dir`, `hydra.sweep.dir`),
wherever that is, the claim of its identity keeps a note, so that it is found and listed like the others.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qat import bounded, scratch
from qat.artifacts import write_text

RUN = re.compile(r"SR-[0-9]{3,12}(-[0-9]{1,9})?")  # second number: for equal first numbers of several machines
NUMBERED = re.compile(r"(?:SR|sweep)-([0-9]{1,9})(?:-[0-9]{1,9})?")
RESULT = "result.json"  # file in a run's folder with its record
RESOLVED = "config_resolved"  # name, without .yaml, of the configuration beside it that repeats the run
PLAN = "sweep.json"  # file in a sweep's folder with its plan
IDS = ".ids"  # folder in the outputs folder, with one folder for each identity ever claimed
NOTE = "folders"  # file in an identity's folder: paths of run folders that the user chose, one a line


def claim_run(outputs: Path) -> str:
    """The next free run identity below `outputs`, `SR-001` and on, taken atomically."""
    return _claim(outputs / IDS, "SR", outputs).name


def give_back(outputs: Path, run_id: str) -> None:
    """Frees an identity under which nothing was kept."""
    home = outputs / IDS / run_id
    (home / NOTE).unlink(missing_ok=True)
    remove_empty(home)


def remove_empty(folder: Path) -> None:
    """Removes a folder and its parents, as long as they are empty and no process holds them."""
    with suppress(OSError):
        for place in (folder.resolve(), *folder.resolve().parents):
            if not Path.cwd().is_relative_to(place):
                place.rmdir()


def claim_sweep(outputs: Path) -> Path:
    """A new, empty folder `sweep-001` and on, made atomically."""
    return _claim(outputs, "sweep", outputs)


def note(outputs: Path, run_id: str, folder: Path) -> None:
    """Notes a run's folder that lies outside the usual places."""
    place, home = Path(os.path.realpath(folder)), Path(os.path.realpath(outputs))
    if place.parent == home and RUN.fullmatch(place.name):
        return
    if place.parent.parent == home and place.parent.name.startswith("sweep-"):
        return
    path = outputs / IDS / run_id / NOTE
    path.parent.mkdir(parents=True, exist_ok=True)
    line = str(place.relative_to(home) if place.is_relative_to(home) else place)
    known = _lines(path)
    if line not in known:
        write_text(path, "\n".join([*known, line, ""]))


def places(outputs: Path) -> Iterator[tuple[str, Path]]:
    """Identity and folder of every run of an outputs folder; a folder that is noted may be gone, or not begun."""
    for folder in (*sorted(outputs.glob("SR-*")), *sorted(outputs.glob("sweep-*/*"))):
        if RUN.fullmatch(folder.name):
            yield folder.name, folder
        elif os.path.isfile(folder / RESULT):
            yield recorded(folder) or folder.name, folder
    for path in sorted((outputs / IDS).glob(f"*/{NOTE}")):
        run_id = path.parent.name
        for folder in (outputs / line for line in _lines(path) if RUN.fullmatch(run_id)):
            if recorded(folder) in (run_id, None):  # otherwise another run has replaced it
                yield run_id, folder


def sweep(outputs: Path) -> None:
    """Removes leftovers of killed processes (in an outputs folder, among temporary files) and sweeps without a plan."""
    kinds = [outputs / kind for kind in ("checkpoints", "caches")]
    runs = [place for _, folder in places(outputs) for place in (folder, folder / "checkpoints")]
    sweeps = list(outputs.glob("sweep-*"))
    artifacts, claims = outputs.glob("artifacts/*"), outputs.glob(f"{IDS}/*")
    for folder in (outputs, *artifacts, *kinds, *claims, *runs, *sweeps, Path(tempfile.gettempdir())):
        scratch.sweep(folder)
    for folder in sweeps:
        scratch.remove_if_empty(folder)


def recorded(folder: Path) -> str | None:
    """The identity that a run's folder says it has; None where it says nothing, or cannot be read."""
    return identity(bounded.said(folder / RESULT).get("run_id"))


def identity(said: object) -> str | None:
    """The run identity in a record; None if it is not a valid one."""
    return said if isinstance(said, str) and RUN.fullmatch(said) else None


def _claim(parent: Path, prefix: str, outputs: Path) -> Path:
    """A new folder in `parent`, numbered above every one there and above what `outputs` shows."""
    parent.mkdir(parents=True, exist_ok=True)
    names = [path.name for folder in (parent, outputs) for path in folder.glob(f"{prefix}-*")]
    taken = [int(match[1]) for name in names if (match := NUMBERED.fullmatch(name))]
    number = max(taken, default=0) + 1
    while True:
        path = parent / f"{prefix}-{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _lines(path: Path) -> list[str]:
    return [line for line in bounded.text(path).splitlines() if line and "\0" not in line]
