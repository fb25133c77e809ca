"""The second derivative of the loss for each latent weight, for `qat.quant.latent`.

The second derivative is the diagonal of the K-FAC approximation that conversion uses (`qat.quant.curvature`):
of outputs times of inputs, measured with the student as it is before training on text it will learn from.
"""

import torch
from transformers import PreTrainedModel

from qat.cache.reader import CacheReader
from qat.conversion.moments import gather
from qat.processes import Ranks
from qat.quant.architectures import Layer
from qat.quant.linear import Quantized

TOKENS = 8_192
ROWS = 32  # rows of text in a batch


def measure(
    student: PreTrainedModel, layers: dict[str, Quantized], kinds: dict[str, str], text: CacheReader, ranks: Ranks
) -> None:
    """Sets the curvature of some layers, the same in every process.

    Args:
        student: as it is now.
        layers: those whose latent weights will learn, by name.
        kinds: of layers, by name.
        text: of which the first `TOKENS` are taken.
        ranks: the processes that train together.

    Raises:
        NumericsError: an input or a gradient is NaN or infinite.
    """
    rows = torch.arange(min(text.rows, max(1, TOKENS // int(text.meta["length"]))))
    batches = [text.batch(part) for part in rows.split(ROWS)]
    known = [Layer(name, kinds[name], (layer.outputs, layer.inputs), layer.format) for name, layer in layers.items()]
    moments = gather(student, known, batches, gradients=True)
    for one in known:
        layer = layers[one.name]
        outer = moments.rows.get(one.name)
        pair = [moments.outputs[one.name].diagonal(), moments.inputs[one.source].diagonal()] if outer is None else [
            outer,
            moments.inputs[one.name].diagonal(),
        ]
        pair = [diagonal.to(layer.indices.device, copy=True) / ranks.count for diagonal in pair]
        ranks.sum_(pair)  # mean over all processes, whose values may differ by rounding
        layer.curvature = (pair[0], pair[1])
