"""Processes that work together, one GPU each: this one's place among them, read off the environment here alone.

They are started by `torchrun` or by `instance.devices`, which says the same. Those that train one student each
compute their rows of every global batch and meet once a step, where the gradients of the few learning tensors are
summed; every one then makes the same update from the same numbers, so nothing else needs to be sent.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qat.errors import RankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # torchrun's variables, with a lone process's values


@dataclass(frozen=True)
class Ranks:
    """This process' place among `count` that work together.

    Attributes:
        rank: from 0.
        count: processes in all.
        local: from 0 on this host; the number of the GPU to use.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """True for the one that writes files and speaks, and for one that works alone."""
        return self.rank == 0

    def own(self, rows: "Tensor") -> "Tensor":
        """This rank's part of some rows [N]; parts differ by at most one row."""
        return rows.tensor_split(self.count)[self.rank]

    def sum_(self, tensors: "list[Tensor]") -> None:
        """Replaces each tensor by its sum over the ranks.

        Raises:
            RankError: one of them is gone.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        try:
            for tensor in tensors:
                dist.all_reduce(tensor)
        except RuntimeError as error:  # type and text of the error depend on the communication backend
            raise RankError(
                f"another of the {self.count} processes that train together has ended:"
                " when its own cause is mended, run.resume=<this run> goes on from the last state"
            ) from error


def place() -> Ranks:
    """The place that the environment gives this process."""
    return Ranks(*(int(os.environ.get(key, default)) for key, default in PLACE.items()))


def started() -> bool:
    """True in a process that was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def environment(rank: int, count: int, port: str) -> dict[str, str]:
    """What a process of several on this computer is told of its place."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in told.items()}


def name() -> str:
    """A name shared by these processes alone, from their parent torchrun and its count of worker restarts."""
    restart, port = (os.environ.get(key, "") for key in ("TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"))
    return f"{os.getppid()}:{port}:{restart}:{place().count}"


@contextmanager
def joined(device: "torch.device") -> Iterator[Ranks]:
    """Joins the other ranks' process group, and leaves it at the end."""
    ranks = place()
    if ranks.count == 1:
        yield ranks
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
