"""What systems do differently: each thing as this one does it, and the plain way where it cannot.

Nothing else in `qat/` imports `fcntl` or `resource` or names a function of `os` or `signal` that Windows lacks, but for
the forked processes of a sweep (`qat/cli/apart.py`), which are Linux's alone. What is asked is whether something is
there; what the system is called, only where that says its units.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no locks of folders
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:  # Windows has no such limits, and psutil knows the peak
    resource = None  # type: ignore[assignment]

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of the system call renameat2(2)

_kept = False  # whether `keep` was called here, or in the process that this one was forked from; to count takes longer


class Positioned:
    """A file that threads read and write at given places, whatever the others are at."""

    def __init__(self, file: Any) -> None:
        """Takes a file that was opened in binary, without a buffer."""
        self._file, self._lock = file, threading.Lock()

    def read_into(self, content: bytearray | memoryview, at: int) -> int:
        """Fills `content` with what begins at byte `at`; returns how many bytes there were before the file's end."""
        left, done = memoryview(content), 0
        while done < len(left) and (count := self._read(left[done:], at + done)):
            done += count
        return done

    def write(self, content: memoryview, at: int) -> None:
        """Writes all of `content`, from byte `at` on."""
        done = 0
        while done < len(content):
            done += self._write(content[done:], at + done)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, content: memoryview, at: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [content], at)
        with self._lock:
            self._file.seek(at)
            return int(self._file.readinto(content))

    def _write(self, content: memoryview, at: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), content, at)
        with self._lock:
            self._file.seek(at)
            return int(self._file.write(content))


def lock(handle: int, wait: bool) -> bool | None:
    """Takes the lock of an open file or folder: False while it is another's; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def opened(path: Path) -> int | None:
    """A handle of a file or folder for `lock`; None where there are no such locks.

    Raises:
        OSError: it is not there.
    """
    if fcntl is None:
        path.stat()
        return None
    return os.open(path, os.O_RDONLY)


def rename(path: Path, to: Path) -> None:
    """Gives a file or folder another name, which nothing has.

    Windows renames nothing of which a file is open or mapped: there, what nobody uses any more is closed first.
    """
    try:
        os.rename(path, to)
    except PermissionError:
        gc.collect()  # models are circles of objects, and hold the files that they were loaded from
        os.rename(path, to)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False where system or file system cannot, and nothing has happened."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError, OSError):  # of macOS, of Windows
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def flush(path: Path) -> None:
    """Puts what was written to a file on disk."""
    with open(path, "r+b") as file:  # Windows flushes for those alone that may write
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Puts the names in a folder on disk, so that a renamed file survives a loss of power."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folder, and has names in its file system's journal
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allow_open(count: int) -> None:
    """Lifts this process's own limit of open files, which is low by default, as far as the system lets it."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def peak_bytes() -> int:
    """The most memory that this process had resident so far."""
    if resource is None:
        import psutil  # a command line needs none of it

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tidy() -> None:
    """Collects what nobody has any more, as models know themselves in circles, and gives its memory back."""
    gc.collect()
    trim()


def keep() -> None:
    """Has no collection look through what is there by now: half a million objects where torch and transformers are.

    For a process of our own, once it has imported what it needs: circles among what is kept are never collected.
    """
    global _kept
    if not _kept:
        gc.collect()
        gc.freeze()
    _kept = True


def trim() -> None:
    """Has the C library give memory back that is free, where it has a function for that, as glibc has."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, TypeError, OSError):
        return


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def user() -> str:
    """What tells users apart who share a folder for temporary files; empty where each has his own."""
    return str(os.getuid()) if hasattr(os, "getuid") else ""


def killed(code: int) -> bool:
    """Whether a process with this exit code got `SIGKILL`, of which no process can tell."""
    return hasattr(signal, "SIGKILL") and code == -signal.SIGKILL
