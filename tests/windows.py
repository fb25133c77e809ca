"""Lets a process go without what Windows lacks, as far as one can on Linux: its modules and functions.

Modules of `qat` find neither. Libraries, which have ways of their own for each system, find them, as these are the ways
for Linux. For all of them, what is open or mapped is neither renamed nor replaced nor removed, no folder is opened, and
a file is flushed for those alone that may write to it.
"""

import builtins
import ctypes
import errno
import fcntl
import importlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psutil

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog", "posix")
FUNCTIONS = {
    "os": (
        *("preadv", "pwritev", "pread", "pwrite", "fork", "forkpty", "register_at_fork", "wait", "WNOHANG"),
        *("getuid", "geteuid", "getgid", "getpgid", "setpgrp", "setpgid", "setsid", "killpg", "nice", "getloadavg"),
        *("uname", "sysconf", "statvfs", "fstatvfs", "sched_getaffinity", "sched_setaffinity", "sched_yield"),
        *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "mkfifo", "chown", "fchown", "sync", "fdatasync"),
        *("posix_fadvise", "posix_fallocate", "sendfile", "copy_file_range", "memfd_create", "pipe2", "lockf"),
    ),
    "signal": (
        *("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGSTOP", "SIGCONT"),
        *("alarm", "setitimer", "pause", "sigwait", "pthread_kill", "pthread_sigmask", "siginterrupt"),
    ),
    "ctypes": (),
}


class Memory(NamedTuple):
    """What psutil says of a process's memory on Windows, as far as it is asked."""

    rss: int
    peak_wset: int


def without() -> None:
    """From here on, for the rest of this process."""
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    psutil.Process.memory_info = lambda self: Memory(1 << 20, 1 << 30)
    os.open, os.fsync = of_files(os.open), of_writers(os.fsync)
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, of_closed(getattr(os, name), onto=name != "rename"))
    lacking = {name: lack(sys.modules[name], names) for name, names in FUNCTIONS.items()}
    lacking["ctypes"].CDLL = of_named(ctypes.CDLL)  # type: ignore[attr-defined]
    builtins.__import__ = for_others(builtins.__import__, lacking)
    there = [module for name, module in sys.modules.items() if ours(name)]
    for module, name in itertools.product(there, lacking):
        if vars(module).get(name) is sys.modules[name]:
            setattr(module, name, lacking[name])
    if "qat.system" in sys.modules:
        importlib.reload(sys.modules["qat.system"])


def ours(name: str | None) -> bool:
    """Whether a module has this name that is of the package."""
    return str(name).partition(".")[0] == "qat"


def lack(module: ModuleType, names: tuple[str, ...]) -> ModuleType:
    """A module without some of its names."""
    made = ModuleType(module.__name__)
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in names})
    return made


def for_others(call: Callable[..., Any], lacking: dict[str, ModuleType]) -> Callable[..., Any]:
    """`import`, which gives `qat` other modules."""

    def imported(name: str, within: Any = None, *rest: Any, **more: Any) -> Any:
        if within and ours(within.get("__name__")):
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            if name.partition(".")[0] in lacking:
                return lacking[name.partition(".")[0]]
        return call(name, within, *rest, **more)

    return imported


def of_named(call: Callable[..., Any]) -> Callable[..., Any]:
    """`ctypes.CDLL`, which knows no library without a name."""

    def loaded(name: str | None, *rest: Any, **more: Any) -> Any:
        if name is None:
            raise TypeError("a name is needed")
        return call(name, *rest, **more)

    return loaded


def of_files(call: Callable[..., int]) -> Callable[..., int]:
    """`os.open`, which opens no folder."""

    def opened(path: Any, *rest: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder", path)
        return call(path, *rest, **more)

    return opened


def of_writers(call: Callable[..., None]) -> Callable[..., None]:
    """`os.fsync`, which flushes for those alone that may write."""

    def flushed(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not opened to write")
        call(number)

    return flushed


def of_closed(call: Callable[..., None], onto: bool) -> Callable[..., None]:
    """What renames or removes, which leaves alone what is open, also below; what is there already, unless `onto`."""

    def changed(*paths: Any, **more: Any) -> None:
        whole = [os.path.abspath(os.fsdecode(path)) for path in paths]
        for path in whole:
            if busy := [one for one in in_use() if one == path or one.startswith(path + os.sep)]:
                raise PermissionError(errno.EACCES, "in use", busy[0])
        if len(whole) > 1 and not onto and os.path.lexists(whole[1]):
            raise FileExistsError(errno.EEXIST, "there already", whole[1])
        call(*paths, **more)

    return changed


def in_use() -> Iterator[str]:
    """Files that this process has open or mapped."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            yield os.readlink(link)
        except OSError:  # that of this listing
            continue
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5]
