"""A whole model quantized, decoder layer by decoder layer.

Moments of one are gathered, its layers are fitted and put away, and the next one comes (`walk` in `moments.py`):
so neither the weights nor the moments nor what is made of them is ever in memory as a whole. Layers of one shape go
through the fit together, a few at a time; where they are small, those of several decoder layers.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import system
from qat.cache.batch import Batch
from qat.config import ConvertConfig, KMeansBackend, KMeansConfig
from qat.console import Advance, progress
from qat.conversion import vocabulary
from qat.conversion.moments import Moments, walk
from qat.errors import NumericsError
from qat.machine import exact_matmul
from qat.peaks import CONVERSION, peaks
from qat.quant import backends, kmeans
from qat.quant.architectures import Layer
from qat.quant.curvature import Curvature, Factor
from qat.quant.embedding import empty, put
from qat.quant.fit import Problem, fit, improve
from qat.quant.formats import Cluster, Fitted, Format
from qat.quant.linear import Quantized
from qat.quant.vocabulary import ROLES

# Work space of a stack by device, in bytes: CPU caches still help; GPU launch time is hidden
STACK_BYTES = {"cpu": 2e8, "cuda": 3e9}

log = logging.getLogger(__name__)

Weights = Callable[[str], Tensor]
Figures = dict[str, float]  # of a layer: relative errors of its weight and output, seconds


class Shelf(Protocol):
    """Where quantized layers are put, and found again.

    Attributes:
        figures: of the layers that are there for good, by name.
    """

    figures: dict[str, Figures]

    def put(self, name: str, module: Quantized) -> None:
        """Keeps a layer."""

    def note(self, figures: dict[str, Figures]) -> None:
        """Says that layers which were put are there for good: a process that is killed is gone on with from there."""

    def get(self, layer: Layer) -> Quantized:
        """A layer that was put, in host memory."""


class Held(dict[str, Quantized]):
    """A shelf in host memory."""

    def __init__(self) -> None:
        self.figures: dict[str, Figures] = {}

    def put(self, name: str, module: Quantized) -> None:
        """Keeps a layer."""
        self[name] = module

    def note(self, figures: dict[str, Figures]) -> None:
        """Takes over figures."""
        self.figures |= figures

    def get(self, layer: Layer) -> Quantized:  # type: ignore[override]
        """A layer that was put."""
        return self[layer.name]


Load = Callable[[Shelf | None], PreTrainedModel]


@dataclass(frozen=True)
class Converted:
    """A quantized layer, in host memory, with the relative errors of its weight and output and its seconds."""

    layer: Layer
    module: Quantized
    figures: Figures


def convert(
    layers: list[Layer],
    load: Load,
    weights: Weights,
    text: list[Batch],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    device: torch.device,
    shelves: Sequence[Shelf],
    scratch: Path | None = None,
) -> dict[str, Figures]:
    """Quantizes layers of a model in `settings.passes` passes.

    The first pass looks at the inputs that layers have in the model as it is, each further one at those
    they have once all are quantized, and improves on the pass before. Layers that shelves have for good are passed
    over; what is fitted together is put away together, so all others come out as if there had been none.

    Args:
        layers: what to quantize, and how.
        load: gives the model on the machine, new at every call, with the layers of a shelf in it.
        weights: gives the weight [O, I] of a layer by name, any float type, any device.
        text: for calibration, in micro-batches.
        settings: how the fit is done.
        kmeans: who makes the first codebooks.
        device: computes.
        shelves: where each pass puts its layers.
        scratch: a folder for hidden states that are too large for memory.

    Returns:
        The figures of each layer by name, see `Converted`.
    """
    passes = shelves[: settings.passes]
    begun = _begun(passes, layers)
    before = passes[begun - 1] if begun else None
    left = [(shelf, [one for one in layers if one.name not in shelf.figures]) for shelf in passes[begun:]]
    if passes[begun].figures:
        log.info("going on with %d of %d layers of pass %d", len(passes[begun].figures), len(layers), begun + 1)
    with progress("layers quantized", sum(_count(pending) for _, pending in left), "weights") as advance:
        for shelf, pending in left:
            parts = walk(load(before), pending, text, settings.gradients, scratch) if pending else iter(())
            for members, moments in groups(parts, STACK_BYTES[fitting(device).type]):
                known = {layer.name: weights(layer.name) for layer in members}
                old = {layer.name: before.get(layer) for layer in members} if before is not None else None
                made = quantize(members, known.__getitem__, moments, settings, kmeans, device, old, advance)
                for one in made:
                    shelf.put(one.layer.name, one.module)
                shelf.note({one.layer.name: one.figures for one in made})
                del known, moments, made, one
                system.trim()  # what a fit leaves between its tensors would grow from layer to layer
            before = shelf
    return {layer.name: passes[-1].figures[layer.name] for layer in layers}


def _begun(passes: Sequence[Shelf], layers: list[Layer]) -> int:
    """The number of the last pass that has all layers, or may go on since the one before it has."""
    whole = [all(layer.name in shelf.figures for layer in layers) for shelf in passes]
    return next((number for number in range(len(passes) - 1, 0, -1) if whole[number] or whole[number - 1]), 0)


def groups(parts: Iterable[tuple[list[Layer], Moments]], max_bytes: float) -> Iterator[tuple[list[Layer], Moments]]:
    """Layers with their moments, as many decoder layers together as one stack of some shape takes."""
    pending, found = list[Layer](), Moments()
    for members, moments in parts:
        pending, used = [*pending, *members], defaultdict[object, float](float)
        found.add(moments)
        for layer in pending:
            used[layer.shape, layer.format] += workspace(layer)
        del moments
        if max(used.values()) >= max_bytes:
            together, known = pending, found
            pending, found = [], Moments()
            yield together, known
            del together, known
    if pending:
        yield pending, found


def quantize(
    layers: list[Layer],
    weights: Weights,
    moments: Moments,
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    device: torch.device,
    before: Mapping[str, Quantized] | None = None,
    advance: Advance = lambda *_: None,
) -> list[Converted]:
    """Fits layers with given moments: from scratch, or from what was `before`, which it improves on.

    Raises:
        NumericsError: a layer's weights are all zero, or hold NaN or infinity; the sentence names the layer.
    """
    fits = _Fits(weights, moments, settings, BACKENDS[kmeans.backend], fitting(device), before or {})
    queue = stacks([layer for layer in layers if layer.role not in ROLES], STACK_BYTES[fits.device.type])
    made = dict[str, Converted]()
    for number, stack in enumerate(queue):
        for one in fits.stack(stack, queue[number + 1 :]):
            made[one.layer.name] = one
        advance(_count(stack))
    for layer in [layer for layer in layers if layer.role in ROLES]:
        with peaks.phase(f"{CONVERSION} of {layer.role}"):
            made[layer.name] = fits.vocabulary(layer)
        advance(layer.weights)
    return [made[layer.name] for layer in layers]


def fitting(device: torch.device) -> torch.device:
    """The device that fits: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _check(stack: list[Layer], weight_NOI: Tensor) -> None:
    """Raises an error that names the first layer whose weights are all zero or not finite."""
    least_N, most_N = weight_NOI.flatten(1).aminmax(dim=1)
    largest_N = torch.maximum(-least_N, most_N).tolist()  # NaN stays NaN
    for layer, largest in zip(stack, largest_N, strict=True):
        if not 0 < largest < math.inf:
            what = "are all zero" if largest == 0 else "hold NaN or infinity"
            raise NumericsError(f"{layer.name} cannot be quantized, its weights {what}: check the model's files")


BACKENDS: dict[KMeansBackend, Cluster] = {
    KMeansBackend.exact: kmeans.kmeans,
    KMeansBackend.kmeans_pytorch: backends.kmeans_pytorch,
}


class _Factors:
    """Factorised input moments, each computed once and kept until the last layer that shares input and `dim`."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], Factor] = {}

    def of(self, inputs: dict[str, Tensor], dim: int, later: list[list[Layer]]) -> dict[str, Factor]:
        """The factors of a stack's input moments by source, for formats of this `dim`."""
        found = {source: self.known.get((source, dim)) or Factor.of(H[None], dim) for source, H in inputs.items()}
        wanted = {(layer.source, layer.format.dim) for others in later for layer in others}
        both = self.known | {(source, dim): factor for source, factor in found.items()}
        self.known = {key: factor for key, factor in both.items() if key in wanted}
        return found


@dataclass(frozen=True)
class _Fits:
    """What all layers are fitted by; the attributes are the arguments of `quantize`, made concrete.

    Attributes:
        cluster: makes the first codebooks.
        device: that fits.
        start: layers of the pass before; empty in the first.
        factors: of the input moments.
    """

    weights: Weights
    moments: Moments
    settings: ConvertConfig
    cluster: Cluster
    device: torch.device
    start: Mapping[str, Quantized]
    factors: _Factors = field(default_factory=_Factors)

    @torch.no_grad()
    @exact_matmul()
    def stack(self, stack: list[Layer], later: list[list[Layer]]) -> list[Converted]:
        """Fits the layers of a stack, after which the `later` ones come."""
        began, format = time.monotonic(), stack[0].format
        weight = _stacked([self.weights(layer.name).to(self.device, torch.float32) for layer in stack])
        _check(stack, weight)
        problem = self._problem(stack, weight, later)
        found = self._solved(problem, format, [self.start[one.name] for one in stack if self.start])
        values = format.grid(found.operands).at(found.index_NOI)
        figures = errors(weight, values, problem.curvature.inputs_NII)
        seconds = {"seconds": (time.monotonic() - began) / len(stack)}
        return [Converted(layer, module(layer, found, n), figures[n] | seconds) for n, layer in enumerate(stack)]

    @torch.no_grad()
    @exact_matmul()
    def vocabulary(self, layer: Layer) -> Converted:
        """Fits embedding or head."""
        weight = self.weights(layer.name).to(self.device, torch.float32)
        _check([layer], weight[None])
        known = (self.moments.inputs[layer.name], self.moments.rows[layer.name])
        old = fitted(layer.format, [self.start[layer.name]], self.device) if self.start else None
        room = STACK_BYTES[self.device.type]
        found, said = vocabulary.quantize(layer, weight, known, old, self.cluster, self.settings, room)
        return Converted(layer, module(layer, found, 0), said)

    def _problem(self, stack: list[Layer], weight_NOI: Tensor, later: list[list[Layer]]) -> Problem:
        inputs = {layer.source: self.moments.inputs[layer.source].to(self.device) for layer in stack}
        factors, outputs = self.factors.of(inputs, stack[0].format.dim, later), self.moments.outputs
        H = _stacked([inputs[layer.source] for layer in stack])
        G = _stacked([outputs[layer.name].to(H.device) for layer in stack]) if outputs else None
        return Problem(weight_NOI, H, Factor.join([factors[layer.source] for layer in stack]), G)

    def _solved(self, problem: Problem, format: Format, before: list[Quantized]) -> Fitted:
        """Fits the layers of a problem, from scratch or from those of the pass before."""
        if not before:
            return fit(problem, format, self.cluster, self.settings.rounds, self.settings.sweeps)
        return improve(problem, format, fitted(format, before, self.device), self.settings.sweeps)


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Matrices as one tensor; a single one is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def stacks(layers: list[Layer], max_bytes: float) -> list[list[Layer]]:
    """Layers of one shape and format, in lists of at most `max_bytes` of work space (at least one layer each)."""
    alike: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        alike[layer.shape, layer.format].append(layer)
    return [stack for members in alike.values() for stack in _pieces(members, int(max_bytes // workspace(members[0])))]


def workspace(layer: Layer) -> float:
    """Bytes needed to fit one such layer: 12 copies of the weight, 5 of the input and 4 of the output moment, fp32."""
    outputs, inputs = layer.shape
    return 4.0 * (12 * outputs * inputs + 5 * inputs**2 + 4 * outputs**2)


def _pieces(members: list[Layer], size: int) -> Iterator[list[Layer]]:
    for begin in range(0, len(members), max(1, size)):
        yield members[begin : begin + max(1, size)]


def _count(layers: list[Layer]) -> int:
    return sum(layer.weights for layer in layers)


def errors(weight_NOI: Tensor, made_NOI: Tensor, H_NII: Tensor) -> list[dict[str, float]]:
    """Squared errors of each layer's weight and output, relative to the squares of the exact ones."""
    difference, outputs = weight_NOI - made_NOI, Curvature(H_NII)
    weight_error = difference.square().sum((1, 2)) / weight_NOI.square().sum((1, 2)).clamp_min(1e-30)
    output_error = outputs.cost(difference) / outputs.cost(weight_NOI).clamp_min(1e-30)
    pairs = zip(weight_error.tolist(), output_error.tolist(), strict=True)
    return [{"weight_error": weight, "output_error": output} for weight, output in pairs]


def module(layer: Layer, made: Fitted, n: int) -> Quantized:
    """Layer n of a fitted stack as a module without bias, in host memory, its parts normalized as in files."""
    device = made.index_NOI.device
    matrix = empty(layer).to(device)
    matrix.indices.copy_(made.index_NOI[n])
    matrix.set_parts(layer.format.stored({name: x[n].contiguous() for name, x in made.operands.items()}))
    return matrix.cpu().requires_grad_(False)


def fitted(format: Format, modules: list[Quantized], device: torch.device) -> Fitted:
    """Quantized layers of one shape in the form that the fit works on."""
    each = [module.parts() for module in modules]
    parts = {name: torch.stack([one[name] for one in each]).to(device) for name in each[0]}
    return Fitted(torch.stack([module.indices for module in modules]).to(device), format.operands(parts))


def install(model: nn.Module, modules: dict[str, Quantized]) -> None:
    """Puts quantized layers into a model, on its device; each takes over the bias and other extras of the old layer."""
    for name, made in modules.items():
        put(model, name, made)
