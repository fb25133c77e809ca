"""Work that goes on beside other work: in threads where a GPU computes, in turn on a processor.

PyTorch computes with OpenMP, which gives each thread that computes a team of its own. While the teams have more threads
than there are cores, all that wait in any of them sleep at once instead of looking again, for as long as the second
team's owner lives, even if it does nothing: with two cores a product of 64 rows then takes twice as long and a small
product of numbers 12 times (`benchmarks/threads.py`). So on a processor one thread computes.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch


def beside(device: torch.device, threads: int, name: str) -> Executor:
    """Where to submit work beside what a device does; on a processor it is done as its result is taken."""
    return InTurn() if device.type == "cpu" else ThreadPoolExecutor(threads, thread_name_prefix=name)


class InTurn(Executor):
    """Does work in the thread that asks for its result, and none that nobody asks for."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Work that is still to be done."""
        return _Asked(partial(work, *given, **named))


class _Asked(Future[Any]):
    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> Any:
        """What the work gives, which it does the first time."""
        if not self.done():
            self.set_result(self._work())
        return super().result()
