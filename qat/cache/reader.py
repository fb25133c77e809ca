"""Reads a cache in batches, in an order that a seed decides, ahead of whoever trains on them."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from qat.artifacts import Artifact, content_key
from qat.cache import older, order
from qat.cache.batch import Batch
from qat.cache.format import READABLE
from qat.cache.shards import Shards
from qat.config import Packing
from qat.errors import ArtifactError
from qat.threads import beside

AHEAD = 4  # batches read in advance


class Source(Protocol):
    """Rows of one split, wherever they come from."""

    rows: int

    def read(self, rows: Tensor, pinned: bool = False) -> dict[str, Tensor]:
        """The tensors of `format.READ` of these rows."""

    def input_ids(self, rows: Tensor) -> Tensor:
        """Token ids [B, L] alone."""

    def place(self, row: int) -> str:
        """Where a row lies, for a person."""


class CacheReader:
    """One split of a cache.

    Attributes:
        meta: what the writer said of the cache.
        rows: sequences in the split.
    """

    def __init__(self, cache: Artifact, split: str) -> None:
        """Looks at every shard's header, without reading the shards.

        Raises:
            ArtifactError: the cache is of another format version, or a shard is not its own.
        """
        self.meta: dict[str, Any] = cache.manifest
        self._source = _open(cache, split)
        self.rows = self._source.rows

    def batch(self, rows: Tensor, pinned: bool = False) -> Batch:
        """The sequences with these numbers [B], in this order."""
        stored = self._source.read(rows, pinned)
        return Batch(stored, int(self.meta["vocab_size"]), self.meta["packing"] == Packing.joined.name)

    def stream(self, order: Iterable[Tensor], device: torch.device) -> Generator[Batch, None, None]:
        """The batches of these row numbers; for a GPU read ahead by a thread, into pinned memory.

        They are copied to the device by whoever takes them (`Batch.to`), who knows the stream to do it on.
        Close it where not all of them are taken: the thread ends with it.
        """
        pinned = device.type == "cuda"
        waiting: deque[Future[Batch]] = deque()
        with beside(device, 1, "cache") as pool:
            try:
                for rows in order:
                    waiting.append(pool.submit(self.batch, rows, pinned))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def place(self, row: int) -> str:
        """Where a row lies, for a person: its number in its shard."""
        return self._source.place(row)

    def input_ids(self, count: int) -> Tensor:
        """Token ids [min(count, rows), L] int64 of the first sequences."""
        rows = torch.arange(min(count, self.rows))
        return self._source.input_ids(rows).long()

    def text_key(self) -> str:
        """A key of the split's tokens as they stand in rows: the same for the same text, whatever else is cached."""
        ids = self.input_ids(self.rows).int()
        return content_key([self.meta["packing"], list(ids.shape), hashlib.sha256(ids.numpy().tobytes()).hexdigest()])

    def in_order(self, size: int) -> list[Tensor]:
        """All row numbers, in file order, as batches of at most `size`."""
        return list(torch.arange(self.rows).split(size))

    def training_rows(self, step: int, size: int, seed: int) -> Tensor:
        """Row numbers [size] of training step `step` (from 0), which depend on nothing else."""
        return order.training_rows(self.rows, step, size, seed)


def _open(cache: Artifact, split: str) -> Source:
    found = cache.manifest.get("format")
    if found == older.FORMAT:
        return older.OlderShards(cache, split)
    if found not in READABLE:
        raise ArtifactError(
            f"{cache.folder} has cache format {found}, this version reads {' and '.join(map(str, READABLE))}:"
            " delete it and run again"
        )
    return Shards(cache.folder, cache.manifest, split)
