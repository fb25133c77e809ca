"""Values by their indices and indices by values: the few operations that quantized weights are made of.

Shapes: N layers, which a single layer's tensors may be without, O outputs, I inputs, K values of each layer.
"""

import torch
from torch import Tensor

LOOKED_UP = 1 << 16  # weights that are looked up at a time on a CPU
COMPARED = 16  # largest number of values that a CPU compares one after the other


def look_up(values_NK: Tensor, index_NOI: Tensor) -> Tensor:
    """`values[index]` [N, O, I], each layer with its own values.

    PyTorch gathers by 64-bit indices, which on a CPU are made for some weights at a time: they stay in its caches.
    """
    if values_NK.dim() == 1:
        return torch.take(values_NK, index_NOI.long())
    if values_NK.device.type != "cpu":
        return values_NK.gather(1, index_NOI.flatten(1).long()).view(index_NOI.shape)
    found_NOI = torch.empty(index_NOI.shape, dtype=values_NK.dtype)
    for values_K, index_OI, found_OI in zip(values_NK, index_NOI, found_NOI, strict=True):
        for index, found in zip(index_OI.flatten().split(LOOKED_UP), found_OI.view(-1).split(LOOKED_UP), strict=True):
            torch.gather(values_K, 0, index.long(), out=found)
    return found_NOI


def entry_sums(x_NOI: Tensor, index_NOI: Tensor, entries: int) -> Tensor:
    """Sums [N, K] of the numbers that have the same index.

    On a GPU one masked reduction an entry: a scatter would queue up at a few addresses. On a CPU one
    count over all, in float64: it passes over the numbers once.
    """
    if x_NOI.dim() == 2:
        return entry_sums(x_NOI[None], index_NOI[None], entries)[0]
    if x_NOI.device.type != "cpu":
        return torch.stack([(x_NOI * (index_NOI == k)).sum(dim=(1, 2)) for k in range(entries)], dim=1)
    layers = torch.arange(len(x_NOI))[:, None, None] * entries
    sums = torch.bincount((index_NOI + layers).flatten(), x_NOI.flatten().double(), len(x_NOI) * entries)
    return sums.view(-1, entries).to(x_NOI.dtype)


def nearest(x: Tensor, values_NK: Tensor) -> Tensor:
    """Index, uint8, of the value nearest to each number of `x` [N, …], values ascending; ties go to the larger one.

    On a GPU one search, which is one launch. A CPU compares many numbers at once with each of a few boundaries instead.
    """
    middle_NK = middles(values_NK)
    if x.device.type != "cpu" or values_NK.shape[-1] > COMPARED:
        found = torch.searchsorted(middle_NK, x.flatten(values_NK.dim() - 1).contiguous(), right=True, out_int32=True)
        return found.to(torch.uint8).view(x.shape)
    index = torch.zeros(x.shape, dtype=torch.uint8)
    for middle_N in middle_NK.unbind(-1):
        index += (x >= middle_N.view(*middle_N.shape, *[1] * (x.dim() - middle_N.dim()))).view(torch.uint8)
    return index


def middles(values_NK: Tensor) -> Tensor:
    """Boundaries [N, K − 1] between neighbouring values."""
    return ((values_NK[..., 1:] + values_NK[..., :-1]) / 2).contiguous()


def relative(weight: Tensor, S: Tensor) -> Tensor:
    """`W / S`; where S is zero, the result is large and has the sign of W."""
    return weight / nonzero(S)


def nonzero(S: Tensor) -> Tensor:
    """S with zeros replaced by the smallest normal number."""
    smallest = torch.finfo(S.dtype).tiny
    return torch.where(S.abs() < smallest, smallest, S)
