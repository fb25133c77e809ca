"""One GPU for each of several processes on one host, found and claimed without torch.

A process keeps its GPU to its end: torch reads `CUDA_VISIBLE_DEVICES` once, and a worker process runs
several jobs of a sweep one after the other.
"""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

_taken: list[IO[str]] = []  # lock file of this process's GPU, kept open until the process ends


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
    file = open(Path(tempfile.gettempdir()) / f"qat-gpu-{os.getuid()}-{name.replace('/', '_')}.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _taken.append(file)
    return True
