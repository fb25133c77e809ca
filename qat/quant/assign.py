"""Chooses the codebook or grid value of each weight.

`nearest` looks at each weight alone. `compensated` is GPTQ (Frantar et al. 2022, section 3.3) on our grid:
columns are fixed in order of decreasing importance, the grid of column j being `values · S[:, j]`, and the
error of each is made up for by the columns not yet fixed, as far as the inputs' correlations allow.
`descended` sweeps over the columns again and lets each index move to the value that is best while all
others stay: coordinate descent on the cost of the error, which never rises. Both are the same walk over
columns (`_walk`) with different matrices.
"""

import torch
from torch import Tensor

from qat.quant import lookup
from qat.quant.curvature import Curvature, Factor
from qat.quant.lookup import look_up
from qat.quant.walk import walk_block

BLOCK = 64  # columns of a block; the error is passed to all later columns after each block
ROWS = 32  # rows moved together where outputs are coupled: few enough for their moves to add up well


def nearest(weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor) -> Tensor:
    """Index [N, O, I] uint8 with the smallest `|W − values[index] ⊙ S|` for each weight by itself."""
    # Where the scale is zero (0/0 too), all values are equally near
    return lookup.nearest(weight_NOI / S_NOI, values_NK)


def compensated(weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor, factor: Factor) -> Tensor:
    """Index [N, O, I] uint8 by error compensation under the second moment behind `factor`."""
    order = factor.order_NI[:, None].expand_as(weight_NOI)
    index = _walk(weight_NOI.gather(2, order), S_NOI.gather(2, order), values_NK, factor.spread_NII, None)[0]
    return index.gather(2, order.argsort(dim=2))


def descended(
    weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor, curvature: Curvature, index_NOI: Tensor
) -> Tensor:
    """Index [N, O, I] uint8 after one sweep of coordinate descent on the cost of the weight's error.

    Rows that no output curvature couples move together. Coupled ones move in groups of `ROWS`, each group
    knowing what those before it did; a layer's group whose moves, taken together, raise the cost stays.
    """
    H, G = curvature.inputs_NII, curvature.outputs_NOO
    spread = H / H.diagonal(dim1=1, dim2=2)[:, None]
    value = look_up(values_NK, index_NOI).mul_(S_NOI)
    if G is None:
        return _descend(curvature.slope(value - weight_NOI), value, S_NOI, values_NK, H, spread)[0]
    index, error = index_NOI.clone(), value - weight_NOI
    for rows in _groups(weight_NOI):
        slope = G[:, rows] @ error @ H
        found, moved = _descend(slope, value[:, rows], S_NOI[:, rows], values_NK, H, spread)
        change = Curvature(H, G[:, rows][:, :, rows]).cost(moved) + 2 * (moved * slope).sum(dim=(1, 2))
        better = (change < 0)[:, None, None]
        index[:, rows] = torch.where(better, found, index[:, rows])
        error[:, rows] += torch.where(better, moved, 0.0)
    return index


def _groups(weight_NOI: Tensor) -> tuple[Tensor, ...]:
    """Row numbers in groups; neighbouring rows, which belong to one attention head, are in different groups."""
    outputs = weight_NOI.shape[1]
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))
    return order.to(weight_NOI.device).split(ROWS)


def _descend(
    slope: Tensor, value: Tensor, S: Tensor, values: Tensor, H: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """One walk that moves each weight to its best value by the local gradient; indices and changes [N, O, I]."""
    return _walk(value - slope / H.diagonal(dim1=1, dim2=2)[:, None], S, values, spread, value)


def _walk(wanted: Tensor, S: Tensor, values: Tensor, spread: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fixes column after column to the grid value nearest to the wanted one.

    Args:
        wanted: [N, O, I]; changed in place.
        S: scales [N, O, I].
        values: [N, K].
        spread: [N, I, I]; a change by d in column j changes what is wanted in a later column k by −spread[j, k]·d.
        value: what changes are counted from, [N, O, I]; None counts from the wanted value itself.

    Returns:
        Indices [N, O, I] uint8 and changes [N, O, I].
    """
    index = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)
    moved = torch.empty_like(wanted)
    for start in range(0, wanted.shape[2], BLOCK):
        here, behind = slice(start, start + BLOCK), slice(start + BLOCK, None)
        before = None if value is None else value[:, :, here]
        walk_block(
            wanted[:, :, here],
            S[:, :, here],
            values,
            spread[:, here, here],
            before,
            index[:, :, here],
            moved[:, :, here],
        )
        wanted[:, :, behind] -= moved[:, :, here] @ spread[:, here, behind]
    return index, moved
