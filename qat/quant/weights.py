"""The weights of the layers that learn in one piece of memory, and the sums of their gradients in the same layout.

Autograd sees each weight as a leaf. What follows one another in the model lies side by side, so that a
product with several layers of one input (query, key and value; gate and up) needs no copy: `joint`.
"""

import math
import weakref
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from qat.machine import WIDENING
from qat.quant.formats.base import ALIGNMENT
from qat.quant.linear import Quantized


class Weights:
    """The weights of some layers and their gradients, summed over the micro-batches of a step.

    Attributes:
        layers: all of them.
        own: those whose weights are written here and whose gradients are summed up here: all, unless several processes
            share them (`qat.quant.shards`).
        latent: indices follow latent weights, which learn by straight-through (Bengio et al. 2013).
        values: all weights in the compute type, [total].
    """

    def __init__(self, layers: list[Quantized], dtype: torch.dtype, latent: bool = False) -> None:
        """Allocates memory; nothing is computed yet."""
        self.layers, self.latent, device = layers, latent, layers[0].indices.device
        self._starts: dict[Quantized, int] = {}
        self.own, total = self._arrange()
        self.values = torch.empty(total, dtype=dtype, device=device)
        self._sums: Tensor | None = None
        self._adding = False
        self._several = [layer for layer in layers if layer.several]
        for layer in layers:
            layer.home, layer.dense = self, self.value(layer).requires_grad_()
            self._watch(layer.dense, [layer])
        self._leaves = {layer: cast(Tensor, layer.dense) for layer in layers}
        self._stacked: dict[Quantized, Tensor] = {}

    def _arrange(self) -> tuple[list[Quantized], int]:
        """Gives every layer its place; returns the layers that are `own`, and how many numbers there are in all."""
        return self.layers, self._lay(self.layers, 0)

    def _lay(self, layers: list[Quantized], start: int) -> int:
        """Puts layers one after the other; returns where they end."""
        for layer in side_by_side(layers):
            self._starts[layer] = start
            start += room(layer)
        return start

    @property
    def written(self) -> Tensor:
        """The part of `values` with the weights of `own`, to which `starts` and `sums` refer."""
        return self.values

    @property
    def sums(self) -> Tensor:
        """The summed gradients of `own`, in the weights' type; fp32 if several are added or latent weights learn."""
        if self._sums is None:
            raise RuntimeError("gradients before begin()")
        return self._sums

    def begin(self, micro_batches: int) -> None:
        """Prepares for the gradients of so many micro-batches."""
        self._adding = micro_batches > 1
        wide = self._adding or self.latent or self._several
        dtype = torch.float32 if wide else self.values.dtype
        if self._sums is None or self._sums.dtype != dtype:
            self._sums = None
            self._sums = torch.zeros_like(self.written, dtype=dtype)  # gaps between weights stay zero
            if self.latent:
                for layer in self.own:
                    layer.latent.grad = self.sum(layer)  # type: ignore[union-attr]  # straight through

    def clear(self) -> None:
        """Clears the gradients of an earlier step."""
        for leaf in [*self._leaves.values(), *self._stacked.values()]:
            leaf.grad = None
        if self._sums is not None:
            for sums in [self._sums] if self._adding else map(self.sum, self._several):
                sums.zero_()

    def value(self, layer: Quantized) -> Tensor:
        """One layer's weight [O, I], a view."""
        return self._cut(self.values, [layer]).detach()

    def sum(self, layer: Quantized) -> Tensor:
        """The summed gradient [O, I] of one of `own`, a view."""
        return self._cut(self.sums, [layer], self._origin)

    def starts(self, layers: list[Quantized]) -> Tensor:
        """Where the weights of some of `own` begin, int64 on their device, multiples of `ALIGNMENT`."""
        return torch.tensor([self._starts[layer] - self._origin for layer in layers], device=self.values.device)

    @property
    def _origin(self) -> int:
        """Where `written` begins."""
        return 0

    def joint(self, layers: list[Quantized]) -> Tensor | None:
        """One weight [ΣO, I] of several layers that share an input, a view; None where they do not lie together."""
        ends = [self._starts.get(layer, -1) + layer.outputs * layer.inputs for layer in layers]
        together = all(self._starts.get(layer) == end for layer, end in zip(layers[1:], ends, strict=False))
        return self._cut(self.values, layers).detach() if together and layers[0] in self._starts else None

    @torch.inference_mode(False)
    def stacked(self, layers: list[Quantized]) -> Tensor | None:
        """The weights of a stack of experts as a leaf [E, O, I]; None where they do not lie side by side.

        Its gradient is added to the sums of all of them.
        """
        starts = [self._starts.get(layer, -1) for layer in layers]
        pitch = starts[1] - starts[0] if len(starts) > 1 else 0
        even = all(later - start == pitch for start, later in pairwise(starts))
        leaves = all(layer.dense is self._leaves.get(layer) for layer in layers)
        if not leaves or not even or pitch < 0 or len({_shape(layer) for layer in layers}) > 1:
            return None
        if layers[0] not in self._stacked:
            leaf = self._cut_stack(self.values, layers).detach().requires_grad_()
            self._watch(leaf, layers)
            self._stacked[layers[0]] = leaf
        return self._stacked[layers[0]]

    @torch.no_grad()
    def add(self, layers: list[Quantized], grad_TO: Tensor, input_TI: Tensor) -> None:
        """Adds the gradient `gradᵀ input` [ΣO, I] of a joint weight to the sums; no copy where these are adjacent."""
        whole, origin = self._gathering(layers)
        place = self._cut(whole, layers, origin)
        if layers[0].several:
            _add_product(place, grad_TO.mT, input_TI)
        elif self._adds(layers):
            place.add_(grad_TO.mT @ input_TI)
        elif place.dtype == grad_TO.dtype:
            torch.mm(grad_TO.mT, input_TI, out=place)
        elif grad_TO.is_cuda and WIDENING:
            torch.mm(grad_TO.mT, input_TI, out_dtype=place.dtype, out=place)
        else:
            place.copy_(grad_TO.mT @ input_TI)
        self._came(layers)

    @torch.no_grad()
    def put(self, layers: list[Quantized], grad: Tensor) -> None:
        """Adds a gradient to the sums: [ΣO, I], or of a stack [E, O, I]."""
        whole, origin = self._gathering(layers)
        place = (self._cut if grad.dim() == 2 else self._cut_stack)(whole, layers, origin)
        (place.add_ if self._adds(layers) else place.copy_)(grad)
        self._came(layers)

    def finish(self) -> None:
        """Told when a micro-batch's gradients have all come."""

    def collect(self) -> None:
        """Told when those of all micro-batches of a step have: from now on `sums` is complete."""

    def exchange(self) -> None:
        """Told when the weights of `own` are written."""

    def arrive(self) -> None:
        """Told before weights are read: from now on `values` is complete."""

    def _gathering(self, layers: list[Quantized]) -> tuple[Tensor, int]:
        """Where gradients of adjacent layers go at first, and the place in `values` at which it begins."""
        return self.sums, self._origin

    def _adds(self, layers: list[Quantized]) -> bool:
        """Whether gradients are added to what is in their place, instead of replacing it."""
        return self._adding or layers[0].several

    def _came(self, layers: list[Quantized]) -> None:
        """Told when gradients are there."""

    def _cut(self, whole: Tensor, layers: list[Quantized], origin: int = 0) -> Tensor:
        start, inputs = self._starts[layers[0]] - origin, layers[0].inputs
        outputs = sum(layer.outputs for layer in layers)
        return whole[start : start + outputs * inputs].view(outputs, inputs)

    def _cut_stack(self, whole: Tensor, layers: list[Quantized], origin: int = 0) -> Tensor:
        """The tensor [E, O, I] of layers of one shape that are adjacent in memory."""
        starts, shape = [self._starts[layer] - origin for layer in layers[:2]], _shape(layers[0])
        begin = whole.storage_offset() + starts[0]
        return whole.as_strided((len(layers), *shape), (starts[-1] - starts[0], shape[1], 1), begin)

    def _watch(self, leaf: Tensor, layers: list[Quantized]) -> None:
        """Has every new gradient of a leaf taken.

        PyTorch holds a hook where Python's collector does not look: one that had what has the leaf would keep all of it
        for good.
        """
        home, known = weakref.ref(self), [weakref.ref(layer) for layer in layers]

        def take(weight: Tensor) -> None:
            there = [layer for one in known if (layer := one()) is not None]
            if (weights := home()) is not None and len(there) == len(known):
                weights._take(there, weight)

        leaf.register_post_accumulate_grad_hook(take)

    def _take(self, layers: list[Quantized], weight: Tensor) -> None:
        """Adds a weight's new gradient to the sum and frees it before the next layer's is computed."""
        if weight.grad is None:
            raise RuntimeError("a weight without its gradient")
        self.put(layers, weight.grad)
        weight.grad = None


def _shape(layer: Quantized) -> tuple[int, int]:
    return layer.outputs, layer.inputs


def room(layer: Quantized) -> int:
    """Numbers from the beginning of a layer's weights to where the next may begin."""
    return math.ceil(layer.outputs * layer.inputs / ALIGNMENT) * ALIGNMENT


def side_by_side(layers: list[Quantized]) -> list[Quantized]:
    """The layers with those of one stack of experts adjacent, otherwise in their order."""
    firsts: dict[object, int] = {}
    places = {layer: firsts.setdefault(layer.stack or layer, n) for n, layer in enumerate(layers)}
    return sorted(layers, key=places.__getitem__)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product to an fp32 total of its size, on CUDA without a second tensor of that size."""
    if total.is_cuda and left.dtype != total.dtype and WIDENING:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
