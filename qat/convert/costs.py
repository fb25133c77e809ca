"""The cost of each layer in each format that it may have; a budget is shared out by these costs.

Every layer is fitted alone, all others being exact. An error E in it adds ½ tr(G E H Eᵀ) nats a token to the KL from
the teacher, G and H being what conversion goes by (`qat.convert.moments`), here gathered with gradients in any case. Of
embedding and head, G is a weight for each row (`qat.convert.vocabulary`). Sweeps are left out: they make every format
better by about as much and take most of the time.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.config import ConvertConfig, KMeansConfig
from qat.convert.convert import Converted, Weights, quantize
from qat.convert.moments import Moments, gather
from qat.machine import exact_matmul
from qat.quant.architectures import Layer
from qat.quant.budget import Costs
from qat.quant.formats import Format

ROWS = 1 << 14  # rows of an embedding's error that are on the device at a time


def costs(
    choices: list[tuple[Layer, list[Format]]],
    load: Callable[[], PreTrainedModel],
    weights: Weights,
    text: list[Batch],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    device: torch.device,
) -> Costs:
    """The cost, in nats per token, of each layer in each of its formats; arguments as of `convert.convert`."""
    moments = gather(load(), [layer for layer, _ in choices], text, gradients=True)
    fitting = moments if settings.gradients else replace(moments, outputs={})
    found: Costs = {layer.name: {} for layer, _ in choices}
    for format in dict.fromkeys(one for _, formats in choices for one in formats):
        members = [replace(layer, format=format) for layer, formats in choices if format in formats]
        for made in quantize(members, weights, fitting, replace(settings, sweeps=0), kmeans, device):
            found[made.layer.name][format] = cost(made, weights(made.layer.name), moments, device)
    return found


@torch.no_grad()
def cost(made: Converted, weight: Tensor, moments: Moments, device: torch.device) -> float:
    """½ tr(G E H Eᵀ) of a quantized layer."""
    layer = made.layer
    error = made.module.weight(torch.float32) - weight.cpu().float()
    H = moments.inputs[layer.source].to(device, torch.float32)
    with exact_matmul():
        if layer.name in moments.rows:
            return _by_rows(error, H, moments.rows[layer.name])
        error, G = error.to(device), moments.outputs[layer.name].to(device, torch.float32)
        return float(((G @ error @ H) * error).sum() / 2)


def _by_rows(error_VD: Tensor, H_DD: Tensor, row_V: Tensor) -> float:
    """½ tr(G E H Eᵀ) with a diagonal G, a weight for each row; computed for `ROWS` rows at a time."""
    total = 0.0
    for error, row in zip(error_VD.split(ROWS), row_V.split(ROWS), strict=True):
        error = error.to(H_DD)
        total += float(row.to(H_DD) @ (error @ H_DD * error).sum(1)) / 2
    return total
