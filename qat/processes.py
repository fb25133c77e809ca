"""Processes that work together, one GPU each: this one's place among them, read off the environment here alone.

They are started by `torchrun` or by `instance.devices`, which says the same. Those that train one student each
compute their rows of every global batch. Where few numbers learn, they meet once a step: gradients are summed, and
every one makes the same update. Where latent weights learn, each holds the states of its share of the layers
(`qat.quant.shards`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qat.errors import RankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BROUGHT_BYTES = 1 << 26  # of a tensor that are on their way to the first process at a time
LAUNCHER = "QAT_LAUNCHER"  # variable with the number of the process that `instance.devices` started others from
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

        with self._told():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, here: bool, device: "torch.device") -> bool:
        """Whether something is so for at least one of the ranks. Waits for the device.

        Raises:
            RankError: one of them is gone.
        """
        import torch

        count = torch.full((), float(here), dtype=torch.float32, device=device)
        self.sum_([count])
        return bool(count.item() > 0)

    def most(self, here: int, device: "torch.device") -> int:
        """The largest of a number of each rank, at most 2^53. Waits for the device.

        Raises:
            RankError: one of them is gone.
        """
        import torch

        numbers = torch.zeros(self.count, dtype=torch.float64, device=device)
        numbers[self.rank] = here
        self.sum_([numbers])
        return int(numbers.max().item())

    def tell(self, text: str, device: "torch.device") -> str:
        """What the first rank says; what others give is not looked at.

        Raises:
            RankError: one of them is gone.
        """
        if self.count == 1:
            return text
        import torch
        import torch.distributed as dist

        said = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        size = torch.tensor(len(said), dtype=torch.int64, device=device)
        with self._told():
            dist.broadcast(size, 0)
            said = said if self.first else said.new_empty(int(size))
            if len(said):
                dist.broadcast(said, 0)
        return bytes(said.tolist()).decode()

    def trade(self, tensor: "Tensor", sizes: list[int]) -> "Trade":
        """Sends every other rank its part of a flat tensor, and gets from each what that has for this one.

        Args:
            tensor: the parts of all others in their order, contiguous; its type is the same everywhere.
            sizes: by rank, how many numbers it gets from each other one, the same everywhere.

        Raises:
            RankError: one of them is gone.
        """
        import torch.distributed as dist

        others = [rank != self.rank for rank in range(self.count)]
        leaving = [size * other for size, other in zip(sizes, others, strict=True)]
        arriving = [sizes[self.rank] * other for other in others]
        found = tensor.new_empty(sum(arriving))
        with self._told():
            work = dist.all_to_all_single(found, tensor, arriving, leaving, async_op=True)
        return Trade(self, work, list(found.split(sizes[self.rank])) if len(found) else [], tensor)

    def spread(self, whole: "Tensor") -> "Trade":
        """Fills a flat tensor of as many equal parts as there are ranks, each of which has computed its own.

        It is whole, and may be written again, once the trade has been waited for.

        Raises:
            RankError: one of them is gone.
        """
        import torch.distributed as dist

        # torch 2.13 renamed it, and warns of the older name
        all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        own = whole.chunk(self.count)[self.rank]
        own = own if own.is_cuda else own.clone()  # NCCL takes a part of the whole as its input, Gloo does not say
        with self._told():
            work = all_gather(whole, own, async_op=True)
        return Trade(self, work, [whole], own)

    def bring(self, tensor: "Tensor", owner: int, device: "torch.device") -> "Tensor":
        """What `owner` has: in the host memory of the first rank a copy, elsewhere the tensor that was given.

        Args:
            tensor: the owner's; elsewhere any of its shape and type.
            owner: a rank.
            device: of this process.

        Raises:
            RankError: one of them is gone.
        """
        import torch
        import torch.distributed as dist

        if owner == self.rank == 0:
            return tensor.detach().to("cpu", copy=True)
        if owner == 0:
            return tensor
        mine = tensor.detach().contiguous().flatten().view(torch.uint8) if owner == self.rank else None
        made = torch.empty(tensor.shape, dtype=tensor.dtype) if self.first else None
        size = tensor.numel() * tensor.element_size()
        for start in range(0, size, BROUGHT_BYTES):
            part = slice(start, min(size, start + BROUGHT_BYTES))
            empty = torch.empty(part.stop - start, dtype=torch.uint8, device=device)
            piece = empty if mine is None else mine[part].to(device)
            with self._told():
                dist.broadcast(piece, owner)
            if made is not None:
                made.view(-1).view(torch.uint8)[part].copy_(piece)
        return tensor if made is None else made

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # type and text of the error depend on the communication backend
            import torch

            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankError(
                f"another of the {self.count} processes that train together has ended:"
                " when its own cause is mended, run.resume=<this run> goes on from the last state"
            ) from error


@dataclass(frozen=True)
class Trade:
    """Tensors under way between ranks: `found`, from each in order, and `sent`, which lives until it has left."""

    ranks: Ranks
    work: Any
    found: "list[Tensor]"
    sent: "Tensor" = field(repr=False)

    def wait(self) -> "list[Tensor]":
        """What was found, there: what the device computes from now on may read it.

        Raises:
            RankError: one of the ranks is gone.
        """
        with self.ranks._told():
            self.work.wait()
        return self.found


def place() -> Ranks:
    """The place that the environment gives this process."""
    return Ranks(*(int(os.environ.get(key, default)) for key, default in PLACE.items()))


def started() -> bool:
    """True in a process that was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher() -> int | None:
    """The number of the process that `instance.devices` started this one from, which tells how all ended."""
    return int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else None


def environment(rank: int, count: int, port: str) -> dict[str, str]:
    """What a process of several on this computer is told of its place, by the one that starts it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told[LAUNCHER] = os.getpid()
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
