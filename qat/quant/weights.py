"""The weights of the layers that learn in one piece of memory, and the sums of their gradients in the same layout.

Autograd sees each weight as a leaf. What follows one another in the model lies side by side, so that a
product with several layers of one input (query, key and value; gate and up) needs no copy: `joint`.
"""

import math
from functools import partial
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
        layers: in the order in which they lie; `dense` of each is a leaf of autograd.
        latent: indices follow latent weights, which learn by straight-through (Bengio et al. 2013).
        values: all weights in the compute type, [total].
    """

    def __init__(self, layers: list[Quantized], dtype: torch.dtype, latent: bool = False) -> None:
        """Allocates memory; nothing is computed yet."""
        self.layers, self.latent = layers, latent
        self._starts: dict[Quantized, int] = {}
        total = 0
        for layer in _side_by_side(layers):
            self._starts[layer] = total
            total += math.ceil(layer.outputs * layer.inputs / ALIGNMENT) * ALIGNMENT
        self.values = torch.empty(total, dtype=dtype, device=layers[0].indices.device)
        self._sums: Tensor | None = None
        self._adding = False
        self._several = [layer for layer in layers if layer.several]
        for layer in layers:
            layer.home, layer.dense = self, self.value(layer).requires_grad_()
            layer.dense.register_post_accumulate_grad_hook(partial(self._take, [layer]))
        self._leaves = {layer: cast(Tensor, layer.dense) for layer in layers}
        self._stacked: dict[Quantized, Tensor] = {}

    @property
    def sums(self) -> Tensor:
        """The summed gradients [total], in the weights' type; fp32 if several are added or latent weights learn."""
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
            self._sums = torch.zeros_like(self.values, dtype=dtype)  # gaps between weights stay zero
            if self.latent:
                for layer in self.layers:
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
        """One layer's summed gradient [O, I], a view."""
        return self._cut(self.sums, [layer])

    def starts(self, layers: list[Quantized]) -> Tensor:
        """Where the weights of some layers begin, int64 on their device, multiples of `ALIGNMENT`."""
        return torch.tensor([self._starts[layer] for layer in layers], device=self.values.device)

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
            leaf.register_post_accumulate_grad_hook(partial(self._take, layers))
            self._stacked[layers[0]] = leaf
        return self._stacked[layers[0]]

    @torch.no_grad()
    def add(self, layers: list[Quantized], grad_TO: Tensor, input_TI: Tensor) -> None:
        """Adds the gradient `gradᵀ input` [ΣO, I] of a joint weight to the sums; no copy where these are adjacent."""
        place = self._cut(self.sums, layers)
        if layers[0].several:
            _add_product(place, grad_TO.mT, input_TI)
        elif self._adding:
            place.add_(grad_TO.mT @ input_TI)
        elif place.dtype == grad_TO.dtype:
            torch.mm(grad_TO.mT, input_TI, out=place)
        elif grad_TO.is_cuda and WIDENING:
            torch.mm(grad_TO.mT, input_TI, out_dtype=place.dtype, out=place)
        else:
            place.copy_(grad_TO.mT @ input_TI)

    def _cut(self, whole: Tensor, layers: list[Quantized]) -> Tensor:
        start, inputs = self._starts[layers[0]], layers[0].inputs
        outputs = sum(layer.outputs for layer in layers)
        return whole[start : start + outputs * inputs].view(outputs, inputs)

    def _cut_stack(self, whole: Tensor, layers: list[Quantized]) -> Tensor:
        """The tensor [E, O, I] of layers of one shape that are adjacent in memory."""
        starts, shape = [self._starts[layer] for layer in layers[:2]], _shape(layers[0])
        return whole.as_strided((len(layers), *shape), (starts[-1] - starts[0], shape[1], 1), starts[0])

    def _take(self, layers: list[Quantized], weight: Tensor) -> None:
        """Adds a weight's new gradient to the sum and frees it before the next layer's is computed."""
        if weight.grad is None:
            raise RuntimeError("a weight without its gradient")
        sums = self.sum(layers[0]) if weight.dim() == 2 else self._cut_stack(self.sums, layers)
        (sums.add_ if self._adding or layers[0].several else sums.copy_)(weight.grad)
        weight.grad = None


def _shape(layer: Quantized) -> tuple[int, int]:
    return layer.outputs, layer.inputs


def _side_by_side(layers: list[Quantized]) -> list[Quantized]:
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
