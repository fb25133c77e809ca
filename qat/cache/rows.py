"""Rows scattered over files, each copied once: from the page cache to where it is used.

Positioned reads, not memory maps: pages that a map has touched count as resident until they are
unmapped, a touch maps its surroundings too, and a file that is cut short meanwhile ends the process.
A read waits without holding Python, so a slow disk stops nobody but the thread that reads ahead.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat import system
from qat.errors import ArtifactError

SPARE_FILES = 256  # file descriptors left for the rest of the process


@dataclass(frozen=True)
class Field:
    """One tensor of a file: its type, the shape of a row, and the byte at which row 0 begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RowFile:
    """A file with tensors of as many rows each, in their natural order."""

    path: Path
    rows: int
    fields: dict[str, Field]


class RowFiles:
    """The rows of some files, numbered through; every file has the same tensors.

    Attributes:
        rows: in all files.
    """

    def __init__(self, files: list[RowFile]) -> None:
        """Opens the files."""
        self._files = files
        self._firsts = np.cumsum([0, *(file.rows for file in files)])
        self.rows = int(self._firsts[-1])
        system.allow_open(len(files) + SPARE_FILES)
        self._opened = [system.Positioned(open(file.path, "rb", buffering=0)) for file in files]  # noqa: SIM115 - see `__del__`

    def __del__(self) -> None:
        """Closes them."""
        for file in getattr(self, "_opened", ()):
            file.close()

    def read(self, rows: Tensor, names: list[str], pinned: bool = False) -> dict[str, Tensor]:
        """The named tensors at these row numbers [B], in this order; into pinned memory where asked for.

        Raises:
            ArtifactError: a file has become shorter.
        """
        fields = self._files[0].fields
        found = {
            name: torch.empty((len(rows), *fields[name].shape), dtype=fields[name].dtype, pin_memory=pinned)
            for name in names
        }
        targets = [
            (name, tensor.view(torch.uint8).numpy().data.cast("B"), fields[name].row_bytes)
            for name, tensor in found.items()
            if fields[name].row_bytes
        ]
        for at, file, row, count in self._runs(rows):
            there = self._files[file]
            for name, target, width in targets:
                offset = there.fields[name].offset + row * width
                part = target[at * width : (at + count) * width]
                if self._opened[file].read_into(part, offset) != len(part):
                    raise ArtifactError(f"{there.path} was cut short while it was read: make it again")
        return found

    def place(self, row: int) -> str:
        """Where a row lies, for a person."""
        file = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return f"row {row - int(self._firsts[file])} of {self._files[file].path.name}"

    def _runs(self, rows: Tensor) -> list[tuple[int, int, int, int]]:
        """Rows that follow each other in a file, together: place in the batch, file, first row, count."""
        numbers = rows.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.rows:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {self.rows}")
        files = np.searchsorted(self._firsts, numbers, side="right") - 1
        breaks = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(files) != 0)) + 1
        starts = np.concatenate([[0], breaks])[: len(numbers)]
        counts = np.diff(np.append(starts, len(numbers)))
        first = numbers[starts] - self._firsts[files[starts]]
        return list(zip(starts.tolist(), files[starts].tolist(), first.tolist(), counts.tolist(), strict=True))
