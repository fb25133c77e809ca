"""The most memory that each phase of a run takes, as `qat.footprint` expects it.

Of a GPU that is what the allocator has set apart: recorded graphs keep memory that counts as no tensor's. Of a
computer it is what is resident in the process; Linux lets a process begin that count anew.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# Phases, as sentences name them
TEXT, CACHE, COMPARISON = "text", "the cache", "comparison of passes"
CONVERSION, FIGURES = "conversion", "figures of the conversion"
TRAINING, EVALUATION, EXPORT = "training", "evaluation", "export"

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of glibc
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
        self.begin(torch.device("cpu"))

    def begin(self, device: torch.device) -> None:
        """Forgets the last run of this process; what is there now counts for no phase."""
        self._device, self._open = device, list[Peak]()
        self.found: dict[str, Peak] = {}
        forget(device)
        self.start = taken(device), taken(torch.device("cpu"))

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

    def _note(self) -> None:
        """Counts what was taken until now for the innermost phase, and begins anew."""
        now = taken(self._device), taken(torch.device("cpu"))
        if self._open:
            self._open[-1].add(*(max(0, count - start) for count, start in zip(now, self.start, strict=True)))
        forget(self._device)


def taken(device: torch.device) -> int:
    """The most bytes taken since they were last forgotten: set apart on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    said = [line.split()[1] for line in _lines(STATUS) if line.startswith("VmHWM:")]
    if said:
        return int(said[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget(device: torch.device) -> None:
    """From here on peaks are counted anew, of host memory where the system can."""
    if TRIM is not None:
        TRIM(0)  # what is free counts for nobody, so malloc gives it back
    if device.type == "cuda":
        torch.cuda.init()  # without it there is nothing to forget, and torch says so by an error
        gc.collect()  # models know themselves in circles
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
