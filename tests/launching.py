"""Launches of the whole program in processes of their own, forked from one that has imported everything already."""

import multiprocessing
import os
import sys
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
    """A launch under way; what it says goes to files beside `outputs`."""

    def __init__(self, outputs: Path, *words: str, before: Callable[[], None] | None = None) -> None:
        """Starts it, after `before` was called in its process."""
        outputs.parent.mkdir(parents=True, exist_ok=True)
        self.outputs = outputs
        self._said = [outputs.parent / f"{outputs.name}-{id(self)}.{name}" for name in ("out", "err")]
        words = (*words, f"outputs={outputs}")
        self.process = processes().Process(target=_launched, args=(words, self._said, before))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def running(self) -> bool:
        """True until it has ended."""
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def ended(self, seconds: float = 200) -> tuple[int | None, str, str]:
        """Waits for its end: exit code, standard output and standard error."""
        self.process.join(seconds)
        out, err = (path.read_text() if path.exists() else "" for path in self._said)
        return self.process.exitcode, out, err


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
