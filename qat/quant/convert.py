"""A whole model to tables: layers of one shape go through the fit together, a few at a time."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.config import ConvertConfig, KMeansBackend, KMeansConfig
from qat.console import progress
from qat.errors import NumericsError
from qat.machine import exact_matmul
from qat.models import linear
from qat.quant import assign, backends, codebook, scales
from qat.quant.fit import Cluster, Tables, fit
from qat.quant.layers import Layer
from qat.quant.linear import QuantLinear

STACK_WEIGHTS = {"cpu": 4_000_000, "cuda": 64_000_000}  # solved at once: what caches hold; what hides launches

Done = Callable[[Layer, QuantLinear, dict[str, float]], None]


def convert(
    model: PreTrainedModel,
    layers: list[Layer],
    moments: dict[str, Tensor],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    done: Done,
) -> None:
    """Quantizes the given layers of a model, handing over each as it is finished.

    Args:
        model: its weights are read and not changed.
        layers: what to quantize, and how.
        moments: H [I, I] by the name of each layer's `source`.
        settings: how the fit is done.
        kmeans: who makes the first tables.
        done: takes a layer, its quantized form, and its relative errors.

    Raises:
        NumericsError: a layer's weights are all zero, or hold NaN or infinity; the sentence names the layer.
    """
    cluster = BACKENDS[kmeans.backend]
    weights = sum(layer.weights for layer in layers)
    device = torch.device("cpu") if model.device.type == "mps" else model.device  # Apple GPUs have no float64
    with torch.no_grad(), exact_matmul(), progress("layers quantized", weights, "weights") as advance:
        for stack in stacks(layers, STACK_WEIGHTS[device.type]):
            began = time.monotonic()
            weight_NOI = torch.stack([linear(model, layer.name).weight.to(device, torch.float32) for layer in stack])
            _check(stack, weight_NOI)
            H_NII = torch.stack([moments[layer.source].to(device) for layer in stack])
            first = stack[0]
            spec = (first.bits, first.rank, cluster, settings.rounds, settings.sweeps)
            tables = fit(weight_NOI, H_NII, assign.Factor(H_NII), *spec)
            seconds = (time.monotonic() - began) / len(stack)
            for n, layer in enumerate(stack):
                figures = errors(weight_NOI[n], tables, n, H_NII[n]) | {"seconds": seconds}
                done(layer, _module(model, layer, tables, n), figures)
            advance(weight_NOI.numel())


def _check(stack: list[Layer], weight_NOI: Tensor) -> None:
    """Names the layer that no table can stand for."""
    largest_N = weight_NOI.abs().amax(dim=(1, 2)).tolist()  # NaN stays NaN
    for layer, largest in zip(stack, largest_N, strict=True):
        if not 0 < largest < math.inf:
            what = "are all zero" if largest == 0 else "hold NaN or infinity"
            raise NumericsError(f"{layer.name} cannot be quantized, its weights {what}: check the model's files")


BACKENDS: dict[KMeansBackend, Cluster] = {
    KMeansBackend.exact: codebook.kmeans,
    KMeansBackend.kmeans_pytorch: backends.kmeans_pytorch,
}


def stacks(layers: list[Layer], most_weights: int) -> list[list[Layer]]:
    """Layers of one shape, bits and rank, in lists of at most `most_weights` weights (one layer at least)."""
    alike: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        alike[layer.shape, layer.bits, layer.rank].append(layer)
    found = []
    for members in alike.values():
        size = max(1, most_weights // members[0].weights)
        remaining = iter(members)
        while stack := list(islice(remaining, size)):
            found.append(stack)
    return found


def errors(weight_OI: Tensor, tables: Tables, n: int, H_II: Tensor) -> dict[str, float]:
    """Squared error of the weight and of the layer's output, relative to their own squares."""
    difference = weight_OI - scales.look_up(tables.table_NK, tables.index_NOI)[n] * (tables.A_NOR[n] @ tables.B_NRI[n])
    output, whole = (scales.output_error(part[None], H_II[None]) for part in (difference, weight_OI))
    return {
        "weight_error": float(difference.square().sum() / weight_OI.square().sum().clamp_min(1e-30)),
        "output_error": float(output / whole.clamp_min(1e-30)),
    }


def _module(model: PreTrainedModel, layer: Layer, tables: Tables, n: int) -> QuantLinear:
    bias = linear(model, layer.name).bias
    module = QuantLinear(*layer.shape, layer.bits, layer.rank, bias).to(model.device)
    module.indices.copy_(tables.index_NOI[n])
    module.lut.copy_(tables.table_NK[n])
    module.scale_A.copy_(tables.A_NOR[n])
    module.scale_B.copy_(tables.B_NRI[n])
    module.set_parameters(module.normalized())
    return module
