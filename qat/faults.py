"""Errors of the machine as one sentence: no memory, no disk space, no right to write.

Such errors surface in a dozen types (`OSError` from Python, others from torch and safetensors, which
report the same system error as text), anywhere in a run. Here they are told apart from defects.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat import system
from qat.errors import MachineError

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOTCONN: "the mounted place is gone",
    errno.ESTALE: "the mounted place is gone",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDY = (
    "what is complete is kept; make room or choose another folder (outputs, store.path, export.output), then repeat the"
    " command"
)

OUT_OF_MEMORY = (
    "out of memory: use a smaller instance.micro_batch (the result stays the same), a shorter cache.length or a machine"
    " with more; what is complete is kept"
)

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
_NUMBER = re.compile(r"os error (\d+)|errno (\d+)", re.IGNORECASE)


def explain(error: BaseException) -> MachineError | None:
    """The sentence for an error of the machine; None for anything else, which is a defect."""
    if _is_memory(error):
        return MachineError(OUT_OF_MEMORY)
    number = _number(error)
    if number not in DISK:
        return None
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return MachineError(f"{DISK[number]}{where}: {REMEDY}")


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Says where it was written to when a disk is full; the system does not, once a file is open.

    Raises:
        MachineError: it is.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None or number not in FULL:
            raise
        raise MachineError(f"{DISK[number]} at {path}: {REMEDY}") from error


def death(code: int, told: str) -> MachineError:
    """The message for a process that ended without one, from its exit code (minus the signal that ended it)."""
    if system.killed(code):
        return MachineError(f"the process was killed ({told}), as systems do that are {OUT_OF_MEMORY}")
    return MachineError(f"the process died ({told}), in a library or at the hand of the system; nothing more is known")


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's class, compared by name so that torch need not be imported
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def _number(error: BaseException) -> int | None:
    """The system's error number, read from the message if a library gives it only there."""
    if isinstance(error, OSError):
        return error.errno
    if not (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"):
        return None
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else None
