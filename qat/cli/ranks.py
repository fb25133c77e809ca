"""`instance.devices=N`: the same command in N processes, one a GPU, which then find each other.

`torchrun --nproc-per-node N -m qat …` does the same from outside. Only the first process speaks and
writes into the run's folder; the others work in a scratch folder of their own. An error is told once, by
the process that knows most of it: whoever started the processes ends all of them when one fails, and those
that would repeat it wait for that. If whoever started them is gone, they end by themselves.
"""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from qat import installation, system
from qat import scratch as temporary
from qat.cli.arguments import quote
from qat.errors import RankError
from qat.processes import environment, launcher, place, started

GRACE = 20.0  # seconds that the other processes have to save their state once one has failed
PATIENCE = 5.0  # seconds to wait for a process that knows the cause of the error to report it
LOOK = 0.5  # seconds between two looks whether whoever started this process is there
INTERRUPTED = 130  # exit code that a shell reports after Ctrl-C (128 + SIGINT)
TERMINATED = 143  # exit code that a shell reports after SIGTERM (128 + 15)


def speaks(error: BaseException) -> bool:
    """Whether this process should tell an error, once those that know better had their turn.

    Beside the first process that is the first, which as a rule fails in the same way; where all that is known
    is that another process is gone, it is that one.
    """
    if started() and (not place().first or isinstance(error, RankError)):
        try:
            time.sleep(PATIENCE)
        except KeyboardInterrupt:  # the error was reported elsewhere, and all processes are being ended
            return place().first
    return True


def outlive_nobody() -> None:
    """Ends this process, if it is one of several, soon after whoever started it: saved first, as SIGTERM has it.

    Where a system gives orphans no other parent, on Windows, nobody notices.
    """
    if started():
        threading.Thread(target=_end_after, args=(launcher() or os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # it waits for one that is gone


def passing() -> Path:
    """A new folder for temporary files, which goes with the process."""
    kept = ExitStack()
    folder = kept.enter_context(temporary.folder(Path(tempfile.gettempdir()) / "qat-rank"))
    atexit.register(kept.close)
    return folder


def scratch() -> list[str]:
    """Overrides that keep a process out of everything that is recorded: one beside the first, or a diagnosis."""
    if not place().first:
        logging.lastResort = logging.NullHandler()  # warnings of loggers with no handler
    folder = passing()
    return [
        f"hydra.run.dir={quote(f'{folder}/SR-000')}",
        f"hydra.sweep.dir={quote(str(folder))}",
        "hydra.sweep.subdir=SR-${hydra.job.num}",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "tracker=none",
    ]


def launch(argv: list[str], count: int) -> int:
    """Runs the command in `count` processes; returns the exit code of the one that failed first, else 0."""
    port = str(_free_port())
    ranks = [_start(argv, index, count, port) for index in range(count)]
    with _forwarded(ranks):
        first = _wait(ranks)
    if first is None:
        return 0
    code = ranks[first].returncode
    if system.killed(code):  # a process killed by SIGKILL cannot report it itself
        print(f"error: process {first} of {count} was killed", file=sys.stderr)
    elif code in (INTERRUPTED, TERMINATED):  # not told by these, which are ended so too when another one fails
        print("interrupted", file=sys.stderr)
    return 128 - code if code < 0 else code


def _start(argv: list[str], index: int, count: int, port: str) -> "subprocess.Popen[bytes]":
    words, told = installation.again()
    return subprocess.Popen([*words, *argv], env=environment(index, count, port) | told)


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> int | None:
    """Until all have ended; the first that failed. The others, which would wait for it for ever, are then ended."""
    first: int | None = None
    end = float("inf")
    while None in [process.poll() for process in ranks]:  # each is asked: a later one may have ended first
        time.sleep(0.05)
        if first is None and (first := _failed(ranks)) is not None:
            end = time.monotonic() + GRACE
            for process in ranks:
                process.terminate()
        if time.monotonic() > end:
            for process in ranks:
                process.kill()
    return _failed(ranks) if first is None else first


def _failed(ranks: "list[subprocess.Popen[bytes]]") -> int | None:
    """The number of a process that has failed: a killed one first, which is no consequence of another's end."""
    codes = {index: process.returncode for index, process in enumerate(ranks) if process.returncode}
    return min(codes, key=codes.__getitem__, default=None)


class _forwarded:
    """Passes SIGTERM on to the ranks; SIGINT reaches them from the terminal, and this process waits for them."""

    def __init__(self, ranks: "list[subprocess.Popen[bytes]]") -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._pass), signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before[0])
        signal.signal(signal.SIGINT, self.before[1])

    def _pass(self, which: int, frame: FrameType | None) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(which)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
