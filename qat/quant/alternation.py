"""The parts of a round of the alternating fit: each lowers `Σ h (W − LUT[index] ⊙ (A @ B))²` for some unknowns.

Indices and table are each the best given the others. Rows of A and columns of B are not solved for: forming
the R × R normal equations of each costs R products with the weight, and what is gained beyond the first step
towards their solution is lost again when the indices move. So each row and column takes one step down its
gradient, preconditioned by a matrix that all share (`B h Bᵀ`, `Aᵀ A`: what the equations are, up to a factor,
where the sizes of the table's values have nothing to do with those of the scales). It goes `BEYOND` times as far
as the lowest point on its way, as in successive over-relaxation (Young 1954): the error falls with every factor
below 2, and rounds that feed one another need fewer of themselves.

Weights are passed over in blocks of rows whose temporaries stay in a processor's caches.

Shapes: N layers, O outputs, I inputs, K table entries, R ranks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.quant.scales import DAMPING, entry_sums, look_up, ratio

AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 23}  # weights in a block: what caches hold; what hides launches
BEYOND = 1.5


def reassign(weight_NOI: Tensor, h_NI: Tensor, table_NK: Tensor, A_NOR: Tensor, B_NRI: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [N, O, I] uint8 of the nearest entries, and the best table [N, K] for these indices.

    The given table ascends. An entry that no index uses stays as it is.
    """
    index = torch.empty(weight_NOI.shape, dtype=torch.uint8, device=weight_NOI.device)
    sums_N2K = torch.zeros(len(weight_NOI), 2, table_NK.shape[1], dtype=torch.float64, device=weight_NOI.device)
    for rows in blocks(weight_NOI):
        W, S = weight_NOI[:, rows], A_NOR[:, rows] @ B_NRI
        found = _reached(W / S, table_NK)
        index[:, rows] = found
        products = torch.stack([W * S, S.square_()], dim=1).mul_(h_NI[:, None, None])
        sums_N2K += _sums(products, found, table_NK.shape[1])
    above, below = sums_N2K.unbind(1)
    return index, torch.where(below > 0, above / below.clamp_min(1e-30), table_NK).to(table_NK.dtype)


def _reached(relative: Tensor, table_NK: Tensor) -> Tensor:
    """Index of the nearest entry, in the type of the relative weights: how many midpoints of entries each reaches."""
    middle_NK = (table_NK[:, 1:] + table_NK[:, :-1]) / 2
    found, reached = torch.zeros_like(relative), torch.empty_like(relative)
    for k in range(middle_NK.shape[1]):
        found += torch.ge(relative, middle_NK[:, k, None, None], out=reached)
    return found


def _sums(values_N2OI: Tensor, found_NOI: Tensor, entries: int) -> Tensor:
    """Sums [N, 2, K] of the values at each index.

    On a CPU a product with the indices as zeros and ones, faster than counting them; a GPU would leave so
    long and thin a product to one of its processors.
    """
    if values_N2OI.device.type != "cpu":
        return torch.stack([entry_sums(values, found_NOI, entries) for values in values_N2OI.unbind(1)], dim=1)
    number_K11 = torch.arange(entries, dtype=found_NOI.dtype)[:, None, None]
    members_NKOI = torch.eq(found_NOI[:, None], number_K11, out=found_NOI.new_empty(0))
    return values_N2OI.flatten(2) @ members_NKOI.flatten(2).mT


def move_rows(
    weight_NOI: Tensor, h_NI: Tensor, table_NK: Tensor, index_NOI: Tensor, A_NOR: Tensor, B_NRI: Tensor
) -> tuple[Tensor, Tensor]:
    """A after one step, and B's slope [N, R, I] there, without the importance, which is one factor for each column."""
    important_NRI = B_NRI * h_NI[:, None]
    shared_NRR = _inverse(important_NRI @ B_NRI.mT)
    moved, slope_NRI = torch.empty_like(A_NOR), torch.zeros_like(B_NRI)
    for rows in blocks(weight_NOI):
        Q, A = look_up(table_NK, index_NOI[:, rows]), A_NOR[:, rows]
        error = weight_NOI[:, rows] - (A @ B_NRI).mul_(Q)
        slope = (error * Q) @ important_NRI.mT
        step = slope @ shared_NRR
        change = (step @ B_NRI).mul_(Q)
        length = BEYOND * ratio((slope * step).sum(2, keepdim=True), change.square() @ h_NI[:, :, None])
        moved[:, rows] = A + length * step
        error -= change.mul_(length)
        slope_NRI += moved[:, rows].mT @ error.mul_(Q)
    return moved, slope_NRI


def move_columns(table_NK: Tensor, index_NOI: Tensor, A_NOR: Tensor, B_NRI: Tensor, slope_NRI: Tensor) -> Tensor:
    """B after one step along the slope that `move_rows` found."""
    step_NRI = _inverse(A_NOR.mT @ A_NOR) @ slope_NRI
    curved_N1I = torch.zeros_like(step_NRI[:, :1])
    for rows in blocks(index_NOI):
        change = (A_NOR[:, rows] @ step_NRI).mul_(look_up(table_NK, index_NOI[:, rows]))
        curved_N1I += change.square_().sum(1, keepdim=True)
    return B_NRI + BEYOND * ratio((slope_NRI * step_NRI).sum(1, keepdim=True), curved_N1I) * step_NRI


def blocks(x_NOI: Tensor) -> Iterator[slice]:
    """Rows that are taken together, of all layers of a stack."""
    layers, outputs, inputs = x_NOI.shape
    size = max(1, AT_ONCE[x_NOI.device.type] // (layers * inputs))
    return (slice(begin, begin + size) for begin in range(0, outputs, size))


def _inverse(gram_NRR: Tensor) -> Tensor:
    """Of the damped matrix, so that a direction that multiplies nothing does no harm."""
    mean = gram_NRR.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
    damping = torch.diag_embed((DAMPING * mean)[:, None].expand(-1, gram_NRR.shape[1]))
    return torch.cholesky_inverse(torch.linalg.cholesky(gram_NRR + damping))
