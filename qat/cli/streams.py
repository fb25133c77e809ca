"""Standard output whose reader may go away: `python launch.py … | head` ends what is shown, never the run."""

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EINVAL)  # how systems say that nobody reads: Windows says the second


class _Outliving(io.FileIO):
    """A descriptor that, once nobody reads from it any more, leads nowhere."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any) -> int:
        """As a file's; what nobody will read counts as written."""
        try:
            return int(super().write(data) or 0)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_readers() -> None:
    """Lets this process, and those that it starts, go on when whoever reads what it says goes away."""
    for name, number in {"stdout": 1, "stderr": 2}.items():
        stream = getattr(sys, name)
        if not _leads_to(stream, number):  # the stream is closed, or replaced inside this process
            continue
        stream.flush()
        buffer = io.BufferedWriter(_Outliving(number))
        lines = stream.line_buffering or number == 2
        kept = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=lines)
        setattr(sys, name, kept)


def _leads_to(stream: object, number: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    except (OSError, ValueError):
        return False
