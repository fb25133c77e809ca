"""Where latent weights begin to learn from.

Straight-through training moves a weight that nobody sees until another table entry is the nearest. From the
entry itself that is half a cell away, whatever the teacher's weight was; from the teacher's weight it may be
next to nothing, but the nearest index there is not the one that conversion chose to make up for the errors
of others. So latent weights begin on the way from the entry to the teacher's weight, inside the entry's cell.

Shapes: O outputs, I inputs, K table entries.
"""

import torch
from torch import Tensor

from qat.quant.codebook import relative
from qat.quant.linear import QuantLinear

REACH = 0.8  # of the way: what lies on a border turns at the first step


@torch.no_grad()
def between(layer: QuantLinear, weight_OI: Tensor) -> Tensor:
    """Latent weights [O, I], fp32, of which a layer's own indices are the nearest.

    Args:
        layer: quantized, its table in any order.
        weight_OI: what the layer stands for. What lies outside of the cell of its index counts as on the
            border; the outer cells are as wide outwards as inwards.
    """
    table_K, order_K = layer.lut.sort()
    place_OI = torch.argsort(order_K)[layer.indices.long()]
    middle = (table_K[1:] + table_K[:-1]) / 2
    low_K = torch.cat([2 * table_K[:1] - middle[:1], middle])
    high_K = torch.cat([middle, 2 * table_K[-1:] - middle[-1:]])
    scale_OI = (layer.scale_A * layer.rank_magnitude) @ layer.scale_B
    weight_OI = relative(weight_OI.to(scale_OI), scale_OI)
    inside_OI = torch.minimum(torch.maximum(weight_OI, low_K[place_OI]), high_K[place_OI])
    return torch.lerp(table_K[place_OI], inside_OI, REACH) * scale_OI
