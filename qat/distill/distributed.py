"""Several processes, one GPU each, that train one student: each computes its rows of every global batch.

The ranks meet once a step, where the gradients of the few learning tensors are summed. Every rank then
makes the same update from the same numbers, so nothing else needs to be sent. Ranks are started by
`torchrun` or by `instance.devices`; their places come from the environment, as torchrun sets it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qat.errors import RankError


@dataclass(frozen=True)
class Ranks:
    """This process' place among `count` that work together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True for the one that writes files and speaks."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows [N]; parts differ by at most one row."""
        return rows.tensor_split(self.count)[self.rank]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks.

        Raises:
            RankError: one of them is gone.
        """
        if self.count == 1:
            return
        try:
            for tensor in tensors:
                dist.all_reduce(tensor)
        except RuntimeError as error:  # of a type and in words that depend on what connects them
            raise RankError(
                f"another of the {self.count} processes that train together has ended:"
                " when its own cause is mended, run.resume=<this run> goes on from the last state"
            ) from error


def place() -> Ranks:
    """The place that the environment gives this process."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Meets the other ranks; they part again at the end."""
    ranks = place()
    if ranks.count == 1:
        yield ranks
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
