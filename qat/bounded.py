"""Reads JSON that other runs, machines and people wrote, within limits on size and depth that are set here alone.

A list of runs reads many such files; a damaged one counts as empty and is named in one warning.
What comes out is a tree of plain values: finite numbers that fit 64 bits, text that can be written, no more than
some levels of it. Everything else in it is null.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qat.errors import ArtifactError

log = logging.getLogger(__name__)

LARGEST = 16_000_000  # maximum bytes of a file; the longest known record has 100,000
LONGEST_ROW = 64_000  # maximum bytes of one line in a file of figures
MOST_ROWS = 256_000_000  # maximum bytes of all lines read from a file of figures
DEEPEST = 32  # maximum nesting of lists and objects
BIGGEST = 2**63  # whole numbers must be smaller than this in absolute value, to fit 64 bits

_named: set[str] = set()  # files already named in a warning


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, within the bounds above.

    Raises:
        ArtifactError: it is not there, cannot be read, or is none.
    """
    if not os.path.isfile(path):
        raise ArtifactError(f"{path} is not there, or no file")
    try:
        value = json.loads(_content(path).decode("utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object")
    return dict(_plain(value, 0))


def said(path: Path) -> dict[str, Any]:
    """As `read`, for a file of another run: empty if it is missing or cannot be read, with one warning."""
    if not os.path.lexists(path):
        return {}
    try:
        return read(path)
    except ArtifactError as error:
        tell_once(path, str(error))
        return {}


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one in each line; lines that hold no complete object are skipped."""
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            while file.tell() < MOST_ROWS and (line := file.readline(LONGEST_ROW)):
                if (found := row(line)) is not None:
                    yield found
    except OSError as error:
        tell_once(path, f"{path} cannot be read: {error.strerror}")


def row(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return dict(_plain(value, 0)) if isinstance(value, dict) else None


def text(path: Path) -> str:
    """The text of a small file, as far as it can be read; empty if there is no file."""
    if not os.path.isfile(path):
        return ""
    try:
        return _content(path).decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        tell_once(path, f"{path} cannot be read: {error}")
        return ""


def tell_once(path: Path, why: str) -> None:
    """Warns about a file that is left out, once for each file in a process."""
    if str(path) not in _named:
        _named.add(str(path))
        log.warning("%s: it is left out", why)


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    return content


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, float):  # most of what hundreds of runs have written
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _written(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < BIGGEST else None
    if depth == DEEPEST:
        return None
    if isinstance(value, list):
        return [_plain(entry, depth + 1) for entry in value]
    return {_written(key): _plain(entry, depth + 1) for key, entry in value.items()}


def _written(text: str) -> str:
    """Text that a file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
