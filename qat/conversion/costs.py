"""The cost of each layer in each format that it may have; a budget is shared out by these costs.

Every layer is fitted alone, all others being exact. An error E in it adds ½ tr(G E H Eᵀ) nats a token to the KL from
the teacher, G and H being what conversion goes by (`moments.py`), here gathered with gradients in any case. Of
embedding and head, G is a weight for each row (`vocabulary.py`). Sweeps are left out: they make every format
better by about as much and take most of the time.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qat.cache.batch import Batch
from qat.config import ConvertConfig, KMeansConfig
from qat.console import progress
from qat.conversion.convert import STACK_BYTES, Converted, Load, Weights, fitting, groups, quantize
from qat.conversion.moments import Moments, walk
from qat.machine import exact_matmul
from qat.quant.architectures import Layer
from qat.quant.budget import Costs
from qat.quant.formats import Format

ROWS = 1 << 14  # rows of an embedding's error that are on the device at a time


def costs(
    choices: list[tuple[Layer, list[Format]]],
    load: Load,
    weights: Weights,
    text: list[Batch],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    device: torch.device,
    scratch: Path | None = None,
) -> Costs:
    """The cost, in nats per token, of each layer in each of its formats; arguments as of `convert.convert`."""
    found: Costs = {layer.name: {} for layer, _ in choices}
    options, quick = {layer.name: formats for layer, formats in choices}, replace(settings, sweeps=0)
    whole = sum(layer.weights * len(formats) for layer, formats in choices)
    with progress("formats tried", whole, "weights") as advance:
        parts = walk(load(None), [layer for layer, _ in choices], text, True, scratch)
        for layers, moments in groups(parts, STACK_BYTES[fitting(device).type]):
            known = {layer.name: weights(layer.name) for layer in layers}
            given = moments if settings.gradients else replace(moments, outputs={})
            for format in dict.fromkeys(one for layer in layers for one in options[layer.name]):
                members = [replace(layer, format=format) for layer in layers if format in options[layer.name]]
                for made in quantize(members, known.__getitem__, given, quick, kmeans, device, advance=advance):
                    found[made.layer.name][format] = cost(made, known[made.layer.name], moments, device)
                    del made
            del known, moments, given
    return {name: {format: of[format] for format in options[name]} for name, of in found.items()}


@torch.no_grad()
def cost(made: Converted, weight: Tensor, moments: Moments, device: torch.device) -> float:
    """½ tr(G E H Eᵀ) of a quantized layer."""
    layer = made.layer
    error = made.module.weight(torch.float32).sub_(weight.cpu())
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
