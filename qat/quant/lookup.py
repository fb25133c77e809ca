"""Values by their indices and indices by values: the few operations that quantized weights are made of.

Shapes: N layers, which a single layer's tensors may be without, O outputs, I inputs, K values of each layer.
"""

import torch
from torch import Tensor

LOOKED_UP = 1 << 16  # weights at once on a CPU
COMPARED = 16  # entries, the most that a CPU compares with one after the other


def look_up(codebook_NK: Tensor, index_NOI: Tensor) -> Tensor:
    """`codebook[index]` [N, O, I] for each layer's own codebook.

    PyTorch gathers by 64-bit indices, which on a CPU are made for some weights at a time: they stay in its caches.
    """
    if codebook_NK.dim() == 1:
        return torch.take(codebook_NK, index_NOI.long())
    if codebook_NK.device.type != "cpu":
        return codebook_NK.gather(1, index_NOI.flatten(1).long()).view(index_NOI.shape)
    found_NOI = torch.empty(index_NOI.shape, dtype=codebook_NK.dtype)
    for codebook_K, index_OI, found_OI in zip(codebook_NK, index_NOI, found_NOI, strict=True):
        for index, found in zip(index_OI.flatten().split(LOOKED_UP), found_OI.view(-1).split(LOOKED_UP), strict=True):
            torch.gather(codebook_K, 0, index.long(), out=found)
    return found_NOI


def entry_sums(value_NOI: Tensor, index_NOI: Tensor, entries: int) -> Tensor:
    """Sum [N, K] of the values at each index.

    On a GPU one masked reduction an entry: a scatter would queue up at a few addresses. On a CPU one
    count over all, in float64: it passes over the values once.
    """
    if value_NOI.dim() == 2:
        return entry_sums(value_NOI[None], index_NOI[None], entries)[0]
    if value_NOI.device.type != "cpu":
        return torch.stack([(value_NOI * (index_NOI == k)).sum(dim=(1, 2)) for k in range(entries)], dim=1)
    layers = torch.arange(len(value_NOI))[:, None, None] * entries
    sums = torch.bincount((index_NOI + layers).flatten(), value_NOI.flatten().double(), len(value_NOI) * entries)
    return sums.view(-1, entries).to(value_NOI.dtype)


def nearest(x: Tensor, codebook_NK: Tensor) -> Tensor:
    """Index, uint8, of the entry nearest to each value of `x` [N, …], entries ascending; ties go to the larger one.

    On a GPU one search, which is one launch. A CPU compares many values at once with each of a few boundaries instead.
    """
    middle_NK = ((codebook_NK[..., 1:] + codebook_NK[..., :-1]) / 2).contiguous()
    if x.device.type != "cpu" or codebook_NK.shape[-1] > COMPARED:
        found = torch.searchsorted(middle_NK, x.flatten(codebook_NK.dim() - 1).contiguous(), right=True, out_int32=True)
        return found.to(torch.uint8).view(x.shape)
    index = torch.zeros(x.shape, dtype=torch.uint8)
    for middle_N in middle_NK.unbind(-1):
        index += (x >= middle_N.view(*middle_N.shape, *[1] * (x.dim() - middle_N.dim()))).view(torch.uint8)
    return index


def relative(weight: Tensor, S: Tensor) -> Tensor:
    """`W / S` where S may touch zero: such a weight is far out on its own side."""
    return weight / nonzero(S)


def nonzero(S: Tensor) -> Tensor:
    """S with the smallest normal number where it touches zero."""
    smallest = torch.finfo(S.dtype).tiny
    return torch.where(S.abs() < smallest, smallest, S)
