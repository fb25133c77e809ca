"""Launches of the whole program in processes of their own, forked from one that has imported everything already."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

IMPORTED = ["launch", "qat.stages.run", "qat.plots", "hydra._internal.hydra", "tests.making"]


def processes() -> ForkServerContext:
    """Where such processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Launch:
    """A launch under way."""

    def __init__(self, outputs: Path, *words: str, before: Callable[[], None] | None = None) -> None:
        """Starts it, after `before` was called in its process."""
        said = Path(tempfile.mkdtemp(dir=Path.home()))  # where there is room, even if `outputs` has none
        self.outputs, self._said = outputs, [said / "out", said / "err"]
        words = (*words, f"outputs={outputs}")
        self._process = processes().Process(target=_launched, args=(words, self._said, before))
        self._process.start()

    def wait_for(self, there: Callable[[], object]) -> None:
        """Returns as soon as something is there."""
        end = time.monotonic() + 60
        while not there():
            assert self._process.is_alive() and time.monotonic() < end, self.ended(0)
            time.sleep(0.001)

    def send(self, number: int) -> None:
        """Sends it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self, seconds: float = 200) -> tuple[int | None, str, str]:
        """Waits for its end, and brings it about after some time: exit code, standard output and standard error."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self._said)
        return self._process.exitcode, out, err


def _launched(words: tuple[str, ...], said: list[Path], before: Callable[[], None] | None) -> None:
    import launch
    from qat import machine
    from qat.cli import main

    for number, path in enumerate(said, start=1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    machine.matmul_flops = lambda _: 1e11  # a second each time
    if before is not None:
        before()
    code = main.main(list(words), launch.launch)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
