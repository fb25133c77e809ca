"""The second derivative of the loss for each latent weight, for `qat.quant.latent`.

The second derivative is the diagonal of the K-FAC approximation that conversion uses (`qat.quant.curvature`):
of outputs times of inputs, measured with the student as it is before training on text it will learn from.
"""

import torch
from transformers import PreTrainedModel

from qat.cache.reader import CacheReader
from qat.console import progress
from qat.conversion.moments import Moments, walk
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
    with progress("layer curvature", sum(layer.weights for layer in known), "weights") as advance:
        for members, moments in walk(student, known, batches, gradients=True):
            for one in members:
                _set(layers[one.name], one, moments, ranks)
            advance(sum(layer.weights for layer in members))


def _set(layer: Quantized, known: Layer, moments: Moments, ranks: Ranks) -> None:
    """Takes the diagonals of a layer's moments, which are too large to be kept of all layers."""
    outer = moments.rows.get(known.name)
    pair = [moments.outputs[known.name].diagonal(), moments.inputs[known.source].diagonal()] if outer is None else [
        outer,
        moments.inputs[known.name].diagonal(),
    ]
    pair = [diagonal.to(layer.indices.device, copy=True) / ranks.count for diagonal in pair]
    ranks.sum_(pair)  # mean over all processes, whose values may differ by rounding
    layer.curvature = (pair[0], pair[1])
