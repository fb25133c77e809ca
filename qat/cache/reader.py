"""Reads a cache in batches, memory-mapped, in an order that a seed decides."""

from dataclasses import dataclass

import torch
from safetensors import safe_open

from qat.artifacts import Artifact
from qat.cache.format import FORMAT_VERSION, generator, shard_name
from qat.errors import ArtifactError


@dataclass(frozen=True)
class Batch:
    """Some sequences with what the teacher says of them; shapes as in `format`, ids int64, floats fp32."""

    input_ids: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor

    @property
    def loss_mask(self) -> torch.Tensor:
        """The positions [B, L-1] that count, bool."""
        return torch.ones(self.topk_ids.shape[:2], dtype=torch.bool, device=self.topk_ids.device)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments for the model."""
        return {"input_ids": self.input_ids}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.topk_ids.to(device), self.topk_logprobs.to(device))

    def split(self, rows: int) -> list["Batch"]:
        """Micro-batches of at most `rows` sequences."""
        parts = (self.input_ids.split(rows), self.topk_ids.split(rows), self.topk_logprobs.split(rows))
        return [Batch(*part) for part in zip(*parts, strict=True)]


class CacheReader:
    """One split of a cache.

    Attributes:
        meta: what the writer said of the cache.
        rows: sequences in the split.
    """

    def __init__(self, cache: Artifact, split: str) -> None:
        """Opens the shards without reading them.

        Raises:
            ArtifactError: the cache is of another format version.
        """
        self.meta = cache.manifest
        if self.meta["format"] != FORMAT_VERSION:
            raise ArtifactError(
                f"{cache.folder} has cache format {self.meta['format']}, this version reads {FORMAT_VERSION}: delete it"
            )
        self.rows = int(self.meta["sequences"][split])
        self._shard_rows = int(self.meta["shard_rows"])
        shards = -(-self.rows // self._shard_rows)
        self._shards = [safe_open(cache.folder / shard_name(split, i), "pt") for i in range(shards)]

    def batch(self, rows: torch.Tensor) -> Batch:
        """The sequences with these numbers [B], in this order."""
        return Batch(
            self._gather("input_ids", rows).long(),
            self._gather("topk_ids", rows).long(),
            self._gather("topk_logprobs", rows).float(),
        )

    def input_ids(self, count: int) -> torch.Tensor:
        """Token ids [min(count, rows), L] int64 of the first sequences."""
        return self._gather("input_ids", torch.arange(min(count, self.rows))).long()

    def in_order(self, size: int) -> list[torch.Tensor]:
        """All row numbers, in file order, as batches of at most `size`."""
        return list(torch.arange(self.rows).split(size))

    def training_rows(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Row numbers [size] of training step `step` (from 0).

        The rows of all steps, joined, are one seeded permutation of the split after another. Any step
        can be asked for directly, so a resumed run needs to remember its step and nothing else.
        """
        places = torch.arange(step * size, (step + 1) * size)
        epochs = places // self.rows
        orders = {int(epoch): self._permutation(seed, int(epoch)) for epoch in epochs.unique()}
        return torch.stack([orders[int(e)][int(p)] for e, p in zip(epochs, places % self.rows, strict=True)])

    def _permutation(self, seed: int, epoch: int) -> torch.Tensor:
        return torch.randperm(self.rows, generator=generator(seed, epoch))

    def _gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        slices = [shard.get_slice(name) for shard in self._shards]
        return torch.stack([slices[row // self._shard_rows][row % self._shard_rows] for row in rows.tolist()])
