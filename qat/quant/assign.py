"""Indices: which table entry stands for each weight.

`nearest` looks at each weight alone. `compensated` is GPTQ (Frantar et al. 2022, section 3.3) on our grid:
columns are fixed in order of decreasing importance, the grid of column j being `LUT · S[:, j]`, and the
error of each is made up for by the columns not yet fixed, as far as the inputs' correlations allow.
`descended` sweeps over the columns again and lets each index move to the entry that is best while all
others stay: coordinate descent on the layer's output error, which never rises.
"""

import torch
from torch import Tensor

from qat.quant import codebook

DAMPING = 0.01  # of the mean diagonal of H
BLOCK = 64  # columns between two updates of everything behind them


def nearest(weight_NOI: Tensor, S_NOI: Tensor, table_NK: Tensor) -> Tensor:
    """Index [N, O, I] uint8 with the least `|W − LUT[index] ⊙ S|` of each weight alone."""
    return codebook.nearest(relative(weight_NOI, S_NOI), table_NK)


def relative(weight: Tensor, S: Tensor) -> Tensor:
    """`W / S` where S may touch zero: such a weight is far out on its own side."""
    smallest = torch.finfo(S.dtype).tiny
    return weight / torch.where(S.abs() < smallest, smallest, S)


def compensated(weight_NOI: Tensor, S_NOI: Tensor, table_NK: Tensor, factor: "Factor") -> Tensor:
    """Index [N, O, I] uint8 by error compensation under the second moment behind `factor`."""
    left = weight_NOI.gather(2, factor.order_NI[:, None].expand_as(weight_NOI))
    S = S_NOI.gather(2, factor.order_NI[:, None].expand_as(S_NOI))
    index = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        error = _fix_block(left, S, table_NK, factor.U_NII, index, start, stop)
        left[:, :, stop:] -= error @ factor.U_NII[:, start:stop, stop:]
    back = factor.order_NI.argsort(dim=1)[:, None].expand_as(index)
    return index.gather(2, back)


def _fix_block(left: Tensor, S: Tensor, table: Tensor, U: Tensor, index: Tensor, start: int, stop: int) -> Tensor:
    """Fixes columns start…stop one after the other; returns their errors [N, O, stop − start]."""
    block, scale = left[:, :, start:stop].mT.contiguous(), S[:, :, start:stop].mT.contiguous()
    error = torch.empty_like(block)
    for j in range(stop - start):
        w, s, row = block[:, j], scale[:, j], U[:, start + j, start:stop]
        chosen = codebook.nearest(relative(w, s), table)
        index[:, :, start + j] = chosen
        error[:, j] = (w - table.gather(1, chosen.long()) * s) / row[:, j, None]
        block[:, j + 1 :] -= row[:, j + 1 :, None] * error[:, j, None]
    return error.mT


def descended(weight_NOI: Tensor, S_NOI: Tensor, table_NK: Tensor, H_NII: Tensor, index_NOI: Tensor) -> Tensor:
    """Index [N, O, I] uint8 after one sweep of coordinate descent on `tr(E H Eᵀ)`, E the weight's error."""
    index = index_NOI.clone()
    gradient = (table_NK.gather(1, index.flatten(1).long()).view(index.shape) * S_NOI - weight_NOI) @ H_NII
    for start in range(0, index.shape[2], BLOCK):
        stop = min(start + BLOCK, index.shape[2])
        moved = _descend_block(gradient, S_NOI, table_NK, H_NII, index, start, stop)
        gradient[:, :, stop:] += moved @ H_NII[:, start:stop, stop:]
    return index


def _descend_block(
    gradient: Tensor, S: Tensor, table: Tensor, H: Tensor, index: Tensor, start: int, stop: int
) -> Tensor:
    """Moves columns start…stop one after the other; returns their changes [N, O, stop − start]."""
    slope, scale = gradient[:, :, start:stop].mT.contiguous(), S[:, :, start:stop].mT.contiguous()
    moved = torch.empty_like(slope)
    for j in range(stop - start):
        s, row = scale[:, j], H[:, start + j, start:stop]
        value = table.gather(1, index[:, :, start + j].long()) * s
        best = value - slope[:, j] / row[:, j, None]
        chosen = codebook.nearest(relative(best, s), table)
        index[:, :, start + j] = chosen
        moved[:, j] = table.gather(1, chosen.long()) * s - value
        slope[:, j + 1 :] += row[:, j + 1 :, None] * moved[:, j, None]
    return moved.mT


class Factor:
    """What error compensation needs of a second moment, computed once for all layers that share an input.

    Attributes:
        order_NI: columns by decreasing diagonal.
        U_NII: upper Cholesky factor of the inverse, columns in that order.
    """

    def __init__(self, H_NII: Tensor) -> None:
        """Factorises H, damped, in full fp32."""
        damped = damp(H_NII)
        self.order_NI = damped.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
        by_row = damped.gather(1, self.order_NI[:, :, None].expand_as(damped))
        ordered = by_row.gather(2, self.order_NI[:, None, :].expand_as(damped))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        self.U_NII = torch.linalg.cholesky(inverse, upper=True)


def damp(H_NII: Tensor) -> Tensor:
    """H with 1 % of its mean diagonal added, so that inputs never seen cost something too."""
    mean = H_NII.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-10)
    return H_NII + DAMPING * mean[:, None, None] * torch.eye(H_NII.shape[1], device=H_NII.device)
