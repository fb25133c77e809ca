"""`instance.devices=N`: the same command in N processes, one a GPU, which then find each other.

`torchrun --nproc-per-node N launch.py …` does the same from outside. Only the first process speaks and
writes into the run's folder; the others work in a scratch folder of their own.
"""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from qat.cli.arguments import quote

LAUNCH = Path(__file__).resolve().parents[2] / "launch.py"
GRACE = 10.0  # seconds in which the others may end by themselves once one has failed


def rank() -> int:
    """The number of this process among those that train together; 0 is the first, or alone."""
    return int(os.environ.get("RANK", "0"))


def started() -> bool:
    """True in a process that was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def scratch() -> list[str]:
    """Overrides that keep a process out of everything that is recorded: one beside the first, or a diagnosis."""
    folder = tempfile.mkdtemp(prefix="qat-rank-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [
        f"hydra.run.dir={quote(f'{folder}/SR-000')}",
        f"hydra.sweep.dir={quote(folder)}",
        "hydra.sweep.subdir=SR-${hydra.job.num}",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "tracker=none",
    ]


def launch(argv: list[str], count: int) -> int:
    """Runs the command in `count` processes; returns the exit code of the one that failed first, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        files = [open(f"{folder}/{i}", "w+") for i in range(count)]  # noqa: SIM115 - closed below
        port = str(_free_port())
        ranks = [_start(argv, i, count, port, None if i == 0 else files[i].fileno()) for i in range(count)]
        with _forwarded(ranks):
            code = _wait(ranks)
        if ranks[0].returncode in (0, -signal.SIGTERM):  # the first had nothing to say
            for file in files:
                file.seek(0)
                sys.stderr.write(file.read())
        for file in files:
            file.close()
        return code


def _start(argv: list[str], index: int, count: int, port: str, stderr: int | None) -> "subprocess.Popen[bytes]":
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    return subprocess.Popen([sys.executable, str(LAUNCH), *argv], env=environment, stderr=stderr)


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> int:
    """Until all have ended; once one fails the others are stopped, which would wait for it for ever."""
    end = float("inf")
    failed = 0
    while any(process.poll() is None for process in ranks):
        time.sleep(0.05)
        codes = [process.returncode for process in ranks if process.returncode]
        if codes and not failed:
            failed, end = codes[0], time.monotonic() + GRACE
        if time.monotonic() > end:
            for process in ranks:
                process.kill() if time.monotonic() > end + GRACE else process.terminate()
    codes = [process.returncode for process in ranks if process.returncode]
    code = failed or (codes[0] if codes else 0)
    return 128 - code if code < 0 else code


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
