"""Ends a launch before the n-th thing that it does to its files, so that every n can be tried.

What counts: opening for writing, renaming, linking, removing, making and removing folders, cutting short, flushing
to disk, exchanging two names, and each safetensors or torch file before it is written and with half of it there.
What lies outside of the given folders does not count. A launch that is killed is gone as a whole, with the
processes that it has forked, as when a machine is taken away.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from qat import system
from tests.launching import Launch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Where an operation's path and the descriptor of the folder that it is relative to are among its arguments.
OPERATIONS = {
    "os.rename": (0, 2),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.remove": (0, 1),
    "os.mkdir": (0, 2),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
}


class Killer:
    """Counts the operations of a process and its children below some folders, and ends all of them before the n-th."""

    def __init__(self, folders: list[Path], number: int, told: int) -> None:
        """Counts from 1; `told` is the descriptor of a file that gets a line for each operation."""
        self.folders, self.number, self.told = tuple(map(str, folders)), number, told
        self.leader, self.done = os.getpid(), multiprocessing.get_context("fork").Value("q", 0)
        self.inside = threading.local()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.before("open", arguments[0])
        elif event in OPERATIONS:
            place, relative = OPERATIONS[event]
            self.before(event, arguments[place], arguments[relative] if relative is not None else -1)

    def before(self, what: str, path: Any, descriptor: int = -1) -> None:
        """Counts an operation, and dies if it is the one."""
        if getattr(self.inside, "now", False):
            return
        self.inside.now = True
        try:
            full = located(path, descriptor)
            if full is not None and full.startswith(self.folders) and self.counts(f"{what} {full}"):
                self.die()
        finally:
            self.inside.now = False

    def counts(self, told: str) -> bool:
        """Counts an operation; True if it is the one."""
        with self.done.get_lock():
            self.done.value += 1
            os.write(self.told, f"{told}\n".encode())
            return bool(self.done.value == self.number)

    def written(self, write: Callable[..., Any], path: Any, content: Callable[[Path], Any]) -> Any:
        """Writes a whole file, which is killed before or halfway; `content` writes it elsewhere."""
        self.before("write", path)
        full = located(path)
        if full is not None and full.startswith(self.folders) and self.counts(f"halfway {full}"):
            self.inside.now = True
            with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
                content(whole := Path(folder) / "whole")
                half = whole.read_bytes()[: whole.stat().st_size // 2]
            Path(full).write_bytes(half)  # as some versions leave it, and others under such a name beside it
            Path(full).with_name(".tmpkilled").write_bytes(half)
            self.die()
        return write()

    def die(self) -> None:
        """Ends the launch, and this process where it is another one."""
        for process in (self.leader, os.getpid()):
            os.kill(process, signal.SIGKILL)


def located(path: Any, descriptor: int = -1) -> str | None:
    """The whole path of what an operation is about; None where it has none."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    above = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
    return os.path.abspath(os.path.join(above, os.fsdecode(path)))


def install(folders: list[Path], number: int, told: Path, home: Path) -> None:
    """Lets this process die before its n-th operation below `folders`; `home` is where its temporary files go."""
    tempfile.tempdir = str(home)
    killer = Killer(folders, number, os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    serialize, save, sync, exchange = safetensors.torch.serialize_file, torch.save, os.fsync, system.exchange

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        write = partial(serialize, tensors, metadata=metadata)
        return killer.written(partial(write, filename), filename, lambda path: write(str(path)))

    def save_all(tensors: Any, file: Any, *rest: Any, **named: Any) -> Any:
        return killer.written(partial(save, tensors, file, *rest, **named), file, lambda path: save(tensors, path))

    def fsync(descriptor: Any) -> None:
        killer.before("fsync", descriptor if isinstance(descriptor, int) else descriptor.fileno())
        sync(descriptor)

    def exchanged(one: Path, other: Path) -> bool:
        killer.before("exchange", other)
        return exchange(one, other)

    safetensors.torch.serialize_file, torch.save = serialize_file, save_all
    os.fsync, system.exchange = fsync, exchanged
    sys.addaudithook(killer.hear)


def killed(work: Callable[[], object], folders: list[Path], number: int, home: Path) -> bool:
    """Works in a forked process that is killed before its n-th operation; False where it does not come so far."""
    process = os.fork()
    if not process:
        code = 1
        try:
            install(folders, number, Path(os.devnull), home)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL), "it failed by itself"
    return code != 0


class Killed(Launch):
    """A launch that ends before its n-th operation below some folders; never with 0."""

    def __init__(self, outputs: Path, *words: str, folders: list[Path], number: int, home: Path) -> None:
        """Starts it."""
        home.mkdir(exist_ok=True)
        self.told = Path(tempfile.mkdtemp()) / "operations"
        super().__init__(outputs, *words, before=partial(install, folders, number, self.told, home))

    def operations(self) -> list[str]:
        """What it did."""
        return self.told.read_text(encoding="utf-8").splitlines() if self.told.exists() else []
