"""Reads JSON from untrusted files: an object within limits on size and depth, or an error with the reason.

Whoever uses what is read may recurse through it, print it and write it again.
"""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24  # maximum bytes of a file, a hundred times the longest manifest seen
DEPTH = 64  # maximum nesting of objects and lists


def read(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else; the text says what, in a few words.
    """
    with open(path, "rb") as file:
        return parsed(file.read(MAX_BYTES + 1))


def parsed(content: bytes) -> dict[str, Any]:
    """The object in some bytes.

    Raises:
        ValueError: as `read`.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8, at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    _look(value)
    return value


def _look(whole: Any) -> None:
    """Refuses values that are nested too deep, and surrogates, which UTF-8 cannot encode."""
    level = [whole]
    for _ in range(DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
                raise ValueError("it holds half of a surrogate pair")
        if not inner:
            return
        level = inner
    raise ValueError("it is nested too deep")
