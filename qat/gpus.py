"""One GPU for each of several processes on one host, found and claimed without torch.

A process keeps its GPU to its end: torch reads `CUDA_VISIBLE_DEVICES` once, and a worker process runs
several jobs of a sweep one after the other.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qat import locks, system

if TYPE_CHECKING:
    from filelock import BaseFileLock

_taken: list["BaseFileLock"] = []  # the lock of this process's GPU, kept until the process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    present = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(present.iterdir())] if present.is_dir() else []


def take_one(number: int) -> None:
    """Shows torch one GPU alone: the first that no other process took, else the `number`th, round and round."""
    names = visible()
    if _taken or len(names) < 2:
        return
    free = next((name for name in names if _lock(name)), names[number % len(names)])
    os.environ["CUDA_VISIBLE_DEVICES"] = free


def _lock(name: str) -> bool:
    lock = locks.take(Path(tempfile.gettempdir()) / f"qat-gpu-{system.user()}-{name.replace('/', '_')}.lock")
    if lock is not None:
        _taken.append(lock)
    return lock is not None
