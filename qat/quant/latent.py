"""Latent weights: their starting values, and the gradient that they learn by.

Straight-through training moves a weight that nobody sees until another codebook entry is the nearest. From the
entry itself that is half a cell away, whatever the teacher's weight was; from the teacher's weight it may be
next to nothing, but the nearest index there is not the one that conversion chose to make up for the errors
of others. So latent weights begin on the way from the entry to the teacher's weight, inside the entry's cell.

Straight-through training (Bengio et al. 2013) gives a latent weight l the gradient g at its entry q. But the
best entry is hardly ever the best weight: what is left of the gradient pushes l on until the next entry is
nearer, and the gradient there pushes it back. In the end it is by chance on either side ("Overcoming
oscillations", Nagel et al. 2022), and rounding errors are up to twice those of nearest entries. The gradient at
l itself is, to second order in this one weight, `g + h (l - q)` with the second derivative h. With it l comes to
rest at `q - g / h`, the lowest point if all others stay, and an index moves where coordinate descent would move
it: only if that lowers the loss. (CAGE, Tabesh et al. 2025, arXiv 2510.18784, has a term of this form with
a factor of its own.) h is the product of a layer's curvature at its outputs and at its inputs, which is measured
once (`qat.distill.curvature`); `qat.quant.stack` adds the term to the gradient.

How fast they learn follows their cells: a step that carries a weight of two bits to the next value carries one of
four bits over several. `PACES` are the rates that were best at 2, 3 and 4 bits (docs/log/training.md), over that at 2;
beyond them each further bit halves it.

Shapes: O outputs, I inputs, K values; M vectors of D numbers.
"""

import torch
from torch import Tensor

from qat.machine import exact_matmul
from qat.quant.formats import Grid
from qat.quant.linear import Quantized
from qat.quant.lookup import are_vectors

VECTORS = 1 << 13  # whose borders are looked for at a time
# Learning rates relative to that of 2 bits, by bits of the index
PACES = {1: 1.0, 2: 1.0, 3: 0.4, 4: 0.175, 5: 0.09, 6: 0.045, 7: 0.0225, 8: 0.01125}
# Share of the way to the teacher's weight or the cell's border; at the border the first step changes indices
REACH = 0.8


@torch.no_grad()
def between(layer: Quantized, weight_OI: Tensor) -> Tensor:
    """Latent weights [O, I], fp32, whose nearest values are those of the layer's own indices.

    Args:
        layer: quantized, its values in any order.
        weight_OI: what the layer stands for. What lies outside of the cell of its index counts as on the
            border; the outer cells are as wide outwards as inwards, those of vectors without end.
    """
    grid = layer.grid()
    if are_vectors(grid.values_NK, layer.indices):
        return _between_vectors(grid, layer.indices, weight_OI.to(grid.scale_NOI))
    values_K, order_K = grid.values_NK.sort()
    place_OI = torch.argsort(order_K)[layer.indices.long()]
    middle = (values_K[1:] + values_K[:-1]) / 2
    low_K = torch.cat([2 * values_K[:1] - middle[:1], middle])
    high_K = torch.cat([middle, 2 * values_K[-1:] - middle[-1:]])
    weight_OI = grid.relative(weight_OI.to(grid.scale_NOI))
    inside_OI = torch.minimum(torch.maximum(weight_OI, low_K[place_OI]), high_K[place_OI])
    return grid.absolute(torch.lerp(values_K[place_OI], inside_OI, REACH))


def _between_vectors(grid: Grid, index_OJ: Tensor, weight_OI: Tensor) -> Tensor:
    """As `between`: each vector goes straight towards the weight's, and no further than to the border of its cell."""
    entry_OI, dim = grid.at(index_OJ), grid.values_NK.shape[1]
    away_OI = weight_OI - entry_OI
    each = [x.reshape(-1, dim).split(VECTORS) for x in (entry_OI, grid.scale_NOI, away_OI)]
    parts = zip(*each, index_OJ.reshape(-1, 1).split(VECTORS), strict=True)
    share_M = torch.cat([_to_the_border(grid.values_NK, *part) for part in parts])
    return entry_OI + REACH * away_OI * share_M.view(index_OJ.shape).repeat_interleave(dim, 1)


def _to_the_border(vectors_KD: Tensor, entry_MD: Tensor, S_MD: Tensor, way_MD: Tensor, index_M1: Tensor) -> Tensor:
    """Which share [M] of their ways vectors may go until another entry than their own is nearer, at most 1.

    An entry that is further by d is as near after a share t of the way w if `t = |d|² / (2 w d)`, and never if that is
    negative.
    """
    table_FK = torch.cat([vectors_KD.square(), -2 * vectors_KD], 1).mT
    with exact_matmul():
        square_MK = torch.cat([S_MD.square(), S_MD * entry_MD], 1) @ table_FK + entry_MD.square().sum(1, True)
        along_MK = (way_MD * S_MD) @ vectors_KD.mT - (way_MD * entry_MD).sum(1, True)
    square_MK.clamp_min_(torch.finfo(square_MK.dtype).tiny).scatter_(1, index_M1.long(), torch.inf)
    return (2 * along_MK / square_MK).amax(1).clamp_min_(1).reciprocal_()
