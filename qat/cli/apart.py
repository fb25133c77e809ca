"""Runs each job of a sweep in its own process, so that the sweep goes on when a job's process dies.

The process is forked where everything is imported and nothing was computed yet: it begins at once, gives all
memory back, and has the GPU for itself when its turn comes. It lies in a process group of its own, to which
the sweep passes every signal on, once; when the sweep itself is killed, so is the job.
"""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from types import FrameType

SET_DEATH_SIGNAL = 1  # option PR_SET_PDEATHSIG of prctl(2): the signal a process gets when its parent process has ended
FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its objective, why it failed if it did (and its exit code), whether it was stopped."""

    objective: float = math.nan
    failure: str | None = None
    exit_code: int = 1
    interrupted: bool = False


class Died(Exception):
    """The process ended without reporting an outcome; `code` is its exit code, or minus the signal that ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        """How the process ended, in a few words."""
        return f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


def is_possible() -> bool:
    """Whether a process can be forked here; the libraries of other systems do not survive it."""
    return sys.platform == "linux" and hasattr(os, "fork") and not multiprocessing.current_process().daemon


def run(work: Callable[[], Outcome]) -> Outcome:
    """Runs `work` in a process of its own and returns its outcome.

    Raises:
        Died: the process is gone and has not said why.
        KeyboardInterrupt: the job was interrupted, or this process was meanwhile.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, theirs, os.getpid()))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # otherwise the job would print the buffered text again
    process.start()
    theirs.close()
    with _forwarding(int(process.pid or 0)):
        outcome = _heard(ours)
        process.join()
    if outcome is None:
        raise Died(int(process.exitcode or 0))
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def _work(work: Callable[[], Outcome], told: Connection, parent: int) -> None:
    """Runs the job inside the new process and sends its outcome back."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the death signal was set
        os._exit(1)
    try:
        outcome = work()
    except KeyboardInterrupt:
        outcome = Outcome(interrupted=True)
    told.send_bytes(json.dumps(asdict(outcome)).encode())


def _heard(pipe: Connection) -> Outcome | None:
    """The outcome that the process sent; None where it sent none."""
    try:
        return Outcome(**json.loads(pipe.recv_bytes()))
    except EOFError:
        return None


@contextmanager
def _forwarding(job: int) -> Iterator[None]:
    """Passes signals on to a process; afterwards they are handled here as well, as they were before.

    Only the main thread of a process gets signals, so from any other nothing can be passed on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        os.kill(job, number)

    before = {which: signal.signal(which, forward) for which in FORWARDED}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    if arrived:
        signal.raise_signal(arrived[0])
