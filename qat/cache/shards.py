"""The shards of one split of a cache in this project's format, checked before anything is read from them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.cache.format import READ, layout, shard_name
from qat.cache.rows import Field, RowFile, RowFiles
from qat.errors import ArtifactError

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
        self.rows, most = int(meta["sequences"][split]), int(meta["shard_rows"])
        counts = [min(most, self.rows - first) for first in range(0, self.rows, most)]
        self._files = RowFiles(
            [_file(folder / shard_name(split, i), meta, split, rows) for i, rows in enumerate(counts)]
        )
        self._names = [name for name in READ if name in layout(meta, split)]

    def read(self, rows: Tensor, pinned: bool = False) -> dict[str, Tensor]:
        """The stored tensors of these rows [B], without the random sample."""
        return self._files.read(rows, self._names, pinned)

    def input_ids(self, rows: Tensor) -> Tensor:
        """Token ids [B, L] int32 alone."""
        return self._files.read(rows, ["input_ids"])["input_ids"]


def _file(path: Path, meta: dict[str, Any], split: str, rows: int) -> RowFile:
    """A shard, once its header is what the cache says."""
    header, start = _header(path)
    itself, wanted_itself = header.pop("__metadata__", {}).get("shard"), f"{meta['key']}/{path.name}"
    if itself != wanted_itself:
        raise ArtifactError(
            f"{path} is the shard {itself} of another cache or place, not {wanted_itself}:"
            f" delete {path.parent} and run again"
        )
    wanted = {name: (kind, [rows, *shape]) for name, (kind, shape) in layout(meta, split).items()}
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != wanted:
        raise ArtifactError(f"{path} does not hold what {path.parent} describes: delete that folder and run again")
    fields = {
        name: Field(DTYPES[entry["dtype"]], tuple(entry["shape"][1:]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return RowFile(path, rows, fields)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(size))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no safetensors shard ({error}): delete {path.parent} and run again") from None
    if path.stat().st_size != 8 + size + end:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes instead of {8 + size + end}: delete {path.parent} and run again"
        )
    return header, 8 + size
