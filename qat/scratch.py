"""Scratch: files and folders are made beside their final place, so a killed process leaves nothing half-made there.

Its name says what it becomes and on which host, `.best.1f3a90c2-x7k2m9qa.scratch`, and who fills it holds its
lock, which the kernel releases when the process is gone, however it went. So whoever comes next can tell what is
nobody's, and sweeps that away. Where a lock says nothing, of another host or on a system without locks, scratch is
nobody's once nothing in it has changed for a day. What is locked is the file or folder itself (flock(2)): it is
renamed into its place or removed, and a lock file beside it (`qat/locks.py`) would stay behind each.
"""

import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from qat import system

SUFFIX = ".scratch"
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
ABANDONED_SECONDS = 86_400.0
REPLACED = ".replaced"  # name in scratch of the folder that was replaced

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<host>[0-9a-f]{8})-\w{8}" + re.escape(SUFFIX), re.DOTALL)


def folder(target: Path) -> AbstractContextManager[Path]:
    """An empty folder beside `target`; what still has its name at the end is removed."""
    return _beside(target, tempfile.mkdtemp)


def file(target: Path) -> AbstractContextManager[Path]:
    """An empty file beside `target`; what still has its name at the end is removed."""
    return _beside(target, _empty_file)


def replace_folder(made: Path, place: Path) -> None:
    """Gives a folder of scratch its place; what lay there is scratch from the moment that the new one has its name.

    Where two names cannot be exchanged at once, the older folder is kept in scratch between two renames, and
    whoever sweeps after a kill puts it back.
    """
    if not place.exists():
        system.rename(made, place)
    elif not system.exchange(made, place):
        with folder(place) as aside:
            system.rename(place, aside / REPLACED)
            system.rename(made, place)


def discard(path: Path) -> None:
    """Removes a folder: under its name there is all of it, or nothing."""
    with folder(path) as aside:
        system.rename(path, aside / path.name)


def sweep(parent: Path, target: str | None = None) -> None:
    """Removes abandoned scratch in a folder: all of it, or only that made for `target`."""
    try:
        found = [match for name in os.listdir(parent) if (match := _NAME.fullmatch(name))]
    except OSError:  # the folder is missing or not readable
        return
    for match in found:
        if target in (None, match["target"]):
            path = parent / match[0]
            with locked(path, wait=False) as took, suppress(OSError):
                if (took and match["host"] == HOST) or (took is not False and _is_abandoned(path)):
                    _remove(path)


def remove_if_empty(path: Path) -> None:
    """Removes a folder that is empty and whose lock no process holds."""
    with locked(path, wait=False) as took, suppress(OSError):
        if took:
            path.rmdir()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Takes the lock of a file or folder: False where it is another's, or gone; None where there are no locks."""
    try:
        handle = system.opened(path)
    except OSError:
        yield False
        return
    if handle is None:
        yield None
        return
    try:
        yield _took(handle, path, wait)
    finally:
        os.close(handle)


@contextmanager
def _beside(target: Path, make: Callable[..., str]) -> Iterator[Path]:
    sweep(target.parent, target.name)
    ours: bool | None = False
    while ours is False:  # again if it was swept before it was locked
        made = Path(make(prefix=f".{target.name}.{HOST}-", suffix=SUFFIX, dir=target.parent))
        with locked(made) as ours:
            if ours is not False:
                try:
                    yield made
                finally:
                    _remove(made)


def _empty_file(**named: object) -> str:
    handle, name = tempfile.mkstemp(**named)  # type: ignore[call-overload]
    os.close(handle)
    return str(name)


def _took(handle: int, path: Path, wait: bool) -> bool | None:
    if not (took := system.lock(handle, wait)):
        return took
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _is_abandoned(path: Path) -> bool:
    """True where nothing has changed for long."""
    newest = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    return time.time() - newest > ABANDONED_SECONDS


def _remove(path: Path) -> None:
    """Removes scratch; what it was to replace goes back to its place if nothing is there."""
    if not path.exists():  # it was renamed
        return
    match, kept = _NAME.fullmatch(path.name), path / REPLACED
    if match and kept.exists() and not (place := path.parent / match["target"]).exists():
        system.rename(kept, place)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
