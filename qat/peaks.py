"""The most memory that each phase of a run takes, as `qat.footprint` expects it.

Of a GPU that is what tensors have, with the memory of recorded graphs, which keep it between replays although no
tensor has it then. What the allocator holds besides is pieces between tensors, which it gives up where memory is short.
Of a computer it is what is resident in the process; Linux lets a process begin that count anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qat import system

# Phases, as sentences name them
TEXT, CACHE, COMPARISON = "text", "the cache", "comparison of passes"
CONVERSION, FIGURES = "conversion", "figures of the conversion"
TRAINING, EVALUATION, ANSWERS, EXPORT = "training", "evaluation", "answers", "export"

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ORDINARY = (0, 0)  # the allocator's name for memory that is no recording's
RESET = "5"  # what Linux begins its count of resident memory anew at (man 5 proc_pid_clear_refs)


@dataclass
class Peak:
    """Bytes that a phase takes at most, beyond what was taken when the run began: on its device, and in host memory."""

    device: int = 0
    host: int = 0

    def add(self, device: int, host: int) -> None:
        """Takes over larger ones."""
        self.device, self.host = max(self.device, device), max(self.host, host)


class Peaks:
    """Peaks by phase. Of a phase inside of another one, the outer one has what it takes before and after.

    Attributes:
        found: by the name of the phase.
        start: bytes that were taken when the run began, on its device and in host memory.
    """

    def __init__(self) -> None:
        self._begin(torch.device("cpu"))  # without a look for garbage: this is imported among much that is none

    def begin(self, device: torch.device) -> None:
        """Forgets the last run of this process; what is there now counts for no phase."""
        forget(device)
        self._begin(device)

    def _begin(self, device: torch.device) -> None:
        self._device, self._open = device, list[Peak]()
        self.found: dict[str, Peak] = {}
        self._recorded = recorded(device)
        self.start = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, memory counts for the phase of this name."""
        self._note()
        self._open.append(self.found.setdefault(name, Peak()))
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the recording of a graph: what it takes meanwhile is its own from then on."""
        self._note()
        self._recorded = 0
        try:
            yield
        finally:
            self._note()

    def _now(self) -> tuple[int, int]:
        """What was taken at most since the last time, on the device and in host memory."""
        host = taken(torch.device("cpu"))
        return (taken(self._device) + self._recorded if self._device.type == "cuda" else host), host

    def _note(self) -> None:
        """Counts what was taken until now for the innermost phase, and begins anew."""
        if self._open:
            pairs = zip(self._now(), self.start, strict=True)
            self._open[-1].add(*(max(0, count - start) for count, start in pairs))
        forget(self._device)
        self._recorded = recorded(self._device)


def taken(device: torch.device) -> int:
    """The most bytes taken since they were last forgotten: by tensors on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    said = [line.split()[1] for line in _lines(STATUS) if line.startswith("VmHWM:")]
    if said:
        return int(said[0]) * 1024
    return system.peak_bytes()


def recorded(device: torch.device) -> int:
    """Bytes that recorded graphs keep on a GPU."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [one for one in torch.cuda.memory_snapshot() if one["device"] == index]
    return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) != ORDINARY)


def forget(device: torch.device) -> None:
    """From here on peaks are counted anew, of host memory where the system can."""
    system.tidy()  # what is free counts for nobody
    if device.type == "cuda":
        torch.cuda.init()  # without it there is nothing to forget, and torch says so by an error
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        FORGET.write_text(RESET)
    except OSError:  # no Linux, or one that does not let it: what an earlier phase took counts on
        return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


peaks = Peaks()
