"""Chooses the codebook or grid value of each weight.

`nearest` looks at each weight alone. `compensated` is GPTQ (Frantar et al. 2022, section 3.3) on our grid:
columns are fixed in order of decreasing importance, the grid of column j being `values · S[:, j]`, and the
error of each is made up for by the columns not yet fixed, as far as the inputs' correlations allow.
Columns that share an index, whose values are vectors, are fixed at once, to what costs least.
`descended` sweeps over the columns again and lets each index move to the value that is best while all
others stay: coordinate descent on the cost of the error, which never rises. Both are the same walk over
columns (`_walk`) with different matrices.
"""

import torch
from torch import Tensor

from qat.quant import lookup
from qat.quant.curvature import Curvature, Factor, blocks
from qat.quant.lookup import look_up
from qat.quant.walk import walk_block, walk_columns, walk_vectors

COLUMNS = 64  # columns that are walked before their error is passed to all later ones
ROWS = 32  # rows moved together where outputs are coupled: few enough for their moves to add up well


def nearest(weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor) -> Tensor:
    """Index [N, O, I] uint8 with the smallest `|W − values[index] ⊙ S|` for each weight, or vector, by itself."""
    if lookup.are_vectors(values_NK, weight_NOI):
        return lookup.nearest_vector(weight_NOI, S_NOI, values_NK)
    # Where the scale is zero (0/0 too), all values are equally near
    return lookup.nearest(weight_NOI / S_NOI, values_NK)


def compensated(weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor, factor: Factor) -> Tensor:
    """Index [N, O, I] uint8 by error compensation under the second moment behind `factor`.

    Values may be vectors [N, K, D], here as in `descended`; then `factor` is one of blocks of D columns.
    """
    metric = factor.metric_NBDD
    weight, S = _columns(weight_NOI, factor.order_NI), _columns(S_NOI, factor.order_NI)
    index = _walk(weight, S, values_NK, factor.spread_NII, metric, None)[0]
    return _columns(index, factor.order_NI[:, :: metric.shape[2]].argsort(dim=1)).contiguous()


def _columns(x_NOI: Tensor, order_NI: Tensor) -> Tensor:
    """The columns in another order; on a CPU each of them lies in one piece of memory."""
    if x_NOI.device.type != "cpu":
        return x_NOI.gather(2, order_NI[:, None].expand_as(x_NOI))
    columns = zip(x_NOI.mT, order_NI, strict=True)
    return torch.stack([x_IO.contiguous().index_select(0, order_I) for x_IO, order_I in columns]).mT


def descended(
    weight_NOI: Tensor, S_NOI: Tensor, values_NK: Tensor, curvature: Curvature, index_NOI: Tensor
) -> Tensor:
    """Index [N, O, I] uint8 after one sweep of coordinate descent on the cost of the weight's error.

    Rows that no output curvature couples move together. Coupled ones move in groups of `ROWS`, each group
    knowing what those before it did; a layer's group whose moves, taken together, raise the cost stays.
    """
    H, G = curvature.inputs_NII, curvature.outputs_NOO
    descent = Descent(H, values_NK)
    value = look_up(values_NK, index_NOI).mul_(S_NOI)
    if G is None:
        return descent.moved(curvature.slope(value - weight_NOI), value, S_NOI)[0]
    index, error = index_NOI.clone(), value - weight_NOI
    for rows in _groups(weight_NOI):
        slope = G[:, rows] @ error @ H
        found, moved = descent.moved(slope, value[:, rows], S_NOI[:, rows])
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


class Descent:
    """Coordinate descent over the indices under the second moment H of the inputs."""

    def __init__(self, H: Tensor, values: Tensor) -> None:
        self.values, self.metric = values, blocks(H, values.shape[2] if values.dim() == 3 else 1)
        self.spread = self._divided(H)

    def moved(self, slope: Tensor, value: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """One walk that moves each weight to its best value by the local gradient; indices, and changes [N, O, I]."""
        return _walk(value - self._divided(slope), S, self.values, self.spread, self.metric, value)

    def _divided(self, x_NXI: Tensor) -> Tensor:
        """Each block of columns times the inverse of H's block."""
        dim = self.metric.shape[2]
        if dim == 1:
            return x_NXI / self.metric[:, None, :, 0, 0]
        return (x_NXI.unflatten(2, (-1, 1, dim)) @ torch.linalg.inv(self.metric)[:, None]).flatten(2)


def _walk(
    wanted: Tensor, S: Tensor, values: Tensor, spread: Tensor, metric: Tensor, value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fixes column after column to the grid value nearest to the wanted one, or block after block to the best vector.

    Args:
        wanted: [N, O, I]; changed in place.
        S: scales [N, O, I].
        values: [N, K], or vectors [N, K, D].
        spread: [N, I, I]; a change by d in column j changes what is wanted in a later column k by −spread[j, k]·d.
        metric: [N, I / D, D, D], how errors of a block's columns add up.
        value: what changes are counted from, [N, O, I]; None counts from the wanted value itself.

    Returns:
        Indices [N, O, I / D] and changes [N, O, I].
    """
    dim = metric.shape[2]
    if dim == 1 and wanted.device.type == "cpu":
        columns, before = wanted.mT.contiguous(), None if value is None else value.mT.contiguous()
        index = walk_columns(columns, S.mT.contiguous(), values, spread, before)
        return index.mT, columns.mT
    shape = (*wanted.shape[:2], wanted.shape[2] // dim)
    index = torch.empty(shape, dtype=lookup.index_type(values.shape[1]), device=wanted.device)
    moved = torch.empty_like(wanted)
    for start in range(0, wanted.shape[2], COLUMNS):
        here, behind = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        block = slice(start // dim, (start + COLUMNS) // dim)
        before = None if value is None else value[:, :, here]
        part = wanted[:, :, here], S[:, :, here], values, spread[:, here, here]
        found = index[:, :, block], moved[:, :, here]
        if dim == 1:
            walk_block(*part, before, *found)
        else:
            walk_vectors(*part, metric[:, block], before, *found)
        wanted[:, :, behind] -= moved[:, :, here] @ spread[:, here, behind]
    return index, moved
