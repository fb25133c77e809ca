"""The shards of one split of a cache in this project's format, checked before anything is read from them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.cache.format import READ, layout, shard_name
from qat.cache.rows import Field, RowFile, RowFiles
from qat.errors import ArtifactError
from qat.tensor_files import Wanted, difference, entries

DTYPES = {"U8": torch.uint8, "U16": torch.uint16, "F16": torch.float16, "I32": torch.int32}


class Shards:
    """Rows of one split.

    Attributes:
        rows: rows in all shards.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], split: str) -> None:
        """Reads the headers.

        Raises:
            ArtifactError: a shard is missing, cut short, of another layout or of another cache.
        """
        self.rows, per_shard = int(meta["sequences"][split]), int(meta["shard_rows"])
        counts = [min(per_shard, self.rows - first) for first in range(0, self.rows, per_shard)]
        self._files = RowFiles(
            [_file(folder / shard_name(split, i), meta, split, rows) for i, rows in enumerate(counts)]
        )
        self._names = [name for name in READ if name in layout(meta, split)]

    def read(self, rows: Tensor, pinned: bool = False) -> dict[str, Tensor]:
        """The stored tensors of these rows [B], without the random sample."""
        return self._files.read(rows, self._names, pinned)

    def place(self, row: int) -> str:
        """Where a row lies, for a person."""
        return self._files.place(row)

    def input_ids(self, rows: Tensor) -> Tensor:
        """Token ids [B, L] int32 alone."""
        return self._files.read(rows, ["input_ids"])["input_ids"]


def _file(path: Path, meta: dict[str, Any], split: str, rows: int) -> RowFile:
    """Opens a shard after a check that its header agrees with the cache."""
    found, said = entries(path, f"delete {path.parent} and run again")
    itself, wanted_itself = said.get("shard"), f"{meta['key']}/{path.name}"
    if itself != wanted_itself:
        raise ArtifactError(
            f"{path} is the shard {itself} of another cache or place, not {wanted_itself}:"
            f" delete {path.parent} and run again"
        )
    wanted = {name: Wanted((kind,), (rows, *shape)) for name, (kind, shape) in layout(meta, split).items()}
    if wrong := difference({name: (entry.kind, entry.shape) for name, entry in found.items()}, wanted):
        raise ArtifactError(
            f"{path} does not hold what {path.parent} describes: it {wrong}; delete that folder and run again"
        )
    fields = {name: Field(DTYPES[entry.kind], entry.shape[1:], entry.offset) for name, entry in found.items()}
    return RowFile(path, rows, fields)
