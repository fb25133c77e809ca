"""CUDA graphs: work that repeats unchanged is recorded once and launched as a whole.

A step of a few sequences is thousands of kernels of some microseconds, and Python cannot launch them as
fast as the GPU runs them. A recorded function must read and write the same tensors at every call and
never wait for the device.
"""

from collections import Counter
from collections.abc import Callable, Hashable

import torch

from qat.peaks import peaks

WARM_UP = 2  # plain calls before recording, in which kernels are compiled and tuned and lasting memory is allocated


def recording_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream on which work can be recorded: it must not be the default one; None where there are no graphs."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Recorder:
    """Calls functions, or replays their recordings."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        """With a stream, on which all work must run, functions are recorded; without one they are only called."""
        self.stream = stream
        self.forget()

    def forget(self) -> None:
        """Drops all recordings: some tensor was replaced."""
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = None if self.stream is None else torch.cuda.graph_pool_handle()

    def recorded(self, key: Hashable) -> bool:
        """Whether further calls only replay."""
        return key in self._graphs

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs `function`; `key` stands for it and for the shapes it works on."""
        self._calls[key] += 1
        if self.stream is None or self._calls[key] <= WARM_UP:
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._record(function)
        self._graphs[key].replay()

    def _record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy or free memory meanwhile; they use none of the recorded tensors.
        recording = torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local")
        with peaks.recording(), recording:
            function()
        return graph
