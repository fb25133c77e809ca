"""What each layer costs in each format that it may have, which is what a budget is shared out by.

Every layer is fitted alone, all others being exact. An error E in it adds ½ tr(G E H Eᵀ) nats a token to the KL from
the teacher, G and H being what conversion goes by (`qat.convert.moments`), here gathered with gradients in any case.
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


def costs(
    choices: list[tuple[Layer, list[Format]]],
    load: Callable[[], PreTrainedModel],
    weights: Weights,
    text: list[Batch],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    device: torch.device,
) -> Costs:
    """The cost, in nats a token, of each layer in each of its formats; the rest as `qat.convert.convert.convert`."""
    moments = gather(load(), [layer for layer, _ in choices], text, gradients=True)
    fitting = moments if settings.gradients else Moments(moments.inputs)
    found: Costs = {layer.name: {} for layer, _ in choices}
    for format in dict.fromkeys(one for _, formats in choices for one in formats):
        members = [replace(layer, format=format) for layer, formats in choices if format in formats]
        for made in quantize(members, weights, fitting, settings, kmeans, device):
            found[made.layer.name][format] = cost(made, weights(made.layer.name), moments, device)
    return found


@torch.no_grad()
def cost(made: Converted, weight: Tensor, moments: Moments, device: torch.device) -> float:
    """½ tr(G E H Eᵀ) of a quantized layer."""
    H = moments.inputs[made.layer.source].to(device, torch.float32)
    G = moments.outputs[made.layer.name].to(device, torch.float32)
    with exact_matmul():
        error = made.module.weight(torch.float32).to(device) - weight.to(device, torch.float32)
        return float(((G @ error @ H) * error).sum() / 2)
