"""Checks the header of a GGUF file before the package gguf relies on it.

That package allocates and loops by the counts that it finds. Layout: the specification in ggml's `docs/gguf.md`.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qat.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 20  # allowed fields, and allowed tensors, in a header: more than any model has
DIMENSIONS = 4
# Bytes of each scalar type, by its number.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
NESTED = 4  # allowed depth of arrays within arrays


def check(path: Path) -> dict[str, str]:
    """Walks over fields and tensors of a file.

    Returns:
        The fields that are texts, by name.

    Raises:
        ConfigError: it is no GGUF file, or claims more than it holds.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            walk = _Walk(content)
            walk.whole()
            return walk.texts
    except (ValueError, KeyError, struct.error) as error:
        raise ConfigError(f"{path} is no GGUF file, or damaged ({error}): download or install it again") from None


class _Walk:
    """A file from its first byte on; whatever lies behind its end is a `ValueError`."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, 0
        self.texts: dict[str, str] = {}

    def whole(self) -> None:
        if self._take(4) != MAGIC or self._number("<I") not in VERSIONS:
            raise ValueError(f"it does not begin like one of version {' or '.join(map(str, VERSIONS))}")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if max(tensors, fields) > MAX_ENTRIES:
            raise ValueError(f"it claims {tensors:,} tensors and {fields:,} fields")
        for _ in range(fields):
            self._field()
        claimed = max([self._tensor() for _ in range(tensors)], default=0)
        if claimed > len(self._content) - self._at:
            raise ValueError(f"its tensors take {claimed:,} bytes, and it has {len(self._content):,} in all")

    def _field(self) -> None:
        name, kind = self._read(), self._number("<I")
        if kind == STRING:
            self.texts[name] = self._read()
        else:
            self._value(kind)

    def _read(self) -> str:
        return self._take(self._number("<Q")).decode(errors="replace")

    def _take(self, count: int) -> bytes:
        self._pass(count)
        return self._content[self._at - count : self._at]

    def _pass(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise ValueError(f"it is cut short, or claims {count:,} bytes at byte {self._at:,}")
        self._at += count

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _text(self) -> None:
        self._pass(self._number("<Q"))

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self._text()
        elif kind == ARRAY and depth < NESTED:
            inner, count = self._number("<I"), self._number("<Q")
            if count > len(self._content):
                raise ValueError(f"it claims a list of {count:,} values")
            if inner in SCALARS:
                self._pass(count * SCALARS[inner])
            else:
                self._each(count, lambda: self._value(inner, depth + 1))
        elif kind in SCALARS:
            self._pass(SCALARS[kind])
        else:
            raise ValueError(f"it has a value of type {kind} at byte {self._at:,}")

    def _each(self, count: int, walk: Callable[[], None]) -> None:
        for _ in range(count):
            walk()

    def _tensor(self) -> int:
        """Skips a tensor's entry; returns where its data ends by its own account."""
        self._text()
        dimensions = self._number("<I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"it has a tensor of {dimensions:,} dimensions")
        values = 1
        for _ in range(dimensions):
            values *= self._number("<Q")
        kind = GGMLQuantizationType(self._number("<I"))
        block, size = GGML_QUANT_SIZES[kind]
        return self._number("<Q") + values // block * size
