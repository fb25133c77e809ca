"""The order of training: one seeded permutation of all rows after another, over all shards."""

from functools import lru_cache

import torch
from torch import Tensor

from qat.seeds import generator


def training_rows(rows: int, step: int, size: int, seed: int) -> Tensor:
    """Row numbers [size] of training step `step` (from 0).

    Any step can be asked for directly, so a resumed run needs to remember its step and nothing else.
    """
    places = torch.arange(step * size, (step + 1) * size)
    epochs = places // rows
    parts = [_permutation(rows, seed, epoch)[places[epochs == epoch] % rows] for epoch in epochs.unique().tolist()]
    return torch.cat(parts)


@lru_cache(maxsize=2)  # two, as a batch may contain the end of one epoch and the beginning of the next
def _permutation(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=generator(seed, epoch))
