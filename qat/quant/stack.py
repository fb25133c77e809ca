"""Weights of many layers of one shape, written at once; their gradients turned into those of the parts.

A model has hundreds of quantized layers of a handful of shapes. Side by side in memory, one kernel serves
all of one shape. The weights are written once a step, whatever the number of micro-batches; each
micro-batch adds to the sum of the weights' gradients, and because W is linear in that sum's place one
reduction at the end gives the parts' gradients exactly.

Shapes: N layers, O outputs, I inputs, K table entries, R ranks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.quant import linear
from qat.quant.linear import QuantLinear

PARTS = ("lut", "scale_A", "scale_B", "rank_magnitude")


def stacks(layers: list[QuantLinear], dtype: torch.dtype, latent: bool = False, snap: bool = False) -> list["Stack"]:
    """The layers in as few stacks as they have shapes, in order of first appearance."""
    alike: dict[Any, list[QuantLinear]] = {}
    for layer in layers:
        alike.setdefault((layer.indices.shape, layer.lut.shape, layer.rank_magnitude.shape), []).append(layer)
    return [Stack(members, dtype, latent, snap) for members in alike.values()]


class Stack:
    """Layers of one shape. Their parameters, indices and kept weights become views into joint tensors.

    Attributes:
        layers: the N modules; `dense` of each is a leaf of autograd.
        indices, lut, scale_A, scale_B, rank_magnitude, latent: the layers' own, joined along N.
        weight: [N, O, I] in the compute type.
        grads: the gradients of the parts, by name; `grad` of each layer's parameter is a view into them.
    """

    def __init__(self, layers: list[QuantLinear], dtype: torch.dtype, latent: bool, snap: bool) -> None:
        """Joins the layers.

        Args:
            layers: of one shape, table size and rank, on one device.
            dtype: compute type of the weights.
            latent: indices follow latent weights, which learn by straight-through (Bengio et al. 2013).
            snap: tables and scales pass through fp16 on their way into the weight, gradients straight
                through, so that the student learns to live with an export in fp16.
        """
        self.layers, self.snap = layers, snap
        self.indices = torch.stack([layer.indices for layer in layers])
        for layer, view in zip(layers, self.indices, strict=True):
            layer.indices = view
        self.lut, self.scale_A, self.scale_B, self.rank_magnitude = (self._join(name) for name in PARTS)
        self.latent = self._join("latent") if latent else None
        self.grads = {name: torch.zeros_like(getattr(self, name)) for name in PARTS}
        for name, joint in self.grads.items():
            self._set_grads(name, joint)
        self.weight = torch.empty(self.indices.shape, dtype=dtype, device=self.indices.device)
        self.summed: Tensor | None = None
        self.adding = False
        for index, layer in enumerate(layers):
            layer.dense = self.weight[index].detach().requires_grad_()
            layer.dense.register_post_accumulate_grad_hook(partial(self._take, index))

    @torch.no_grad()
    def write(self) -> None:
        """Computes every weight, and before that the indices where they learn."""
        lut, A, B = self._parts()
        if (kernels := _kernels(self.weight)) is not None:
            kernels.write(self.indices, lut, A, B, self.latent, self.weight)
            return
        for n, indices in enumerate(self.indices):
            scale = A[n] @ B[n]
            if self.latent is not None:
                indices.copy_(linear.nearest(self.latent[n], lut[n], scale))
            torch.mul(linear.look_up(lut[n], indices), scale, out=scale)
            self.weight[n].copy_(scale)

    def begin(self, micro_batches: int) -> None:
        """Prepares for the gradients of so many micro-batches, summed in fp32 when there are several."""
        self.adding = micro_batches > 1
        dtype = torch.float32 if self.adding or self.latent is not None else self.weight.dtype
        if self.summed is None or self.summed.dtype != dtype:
            self.summed = None
            self.summed = torch.empty_like(self.weight, dtype=dtype)
            if self.latent is not None:
                self.grads["latent"] = self.summed  # straight through
                self._set_grads("latent", self.summed)

    def clear(self) -> None:
        """Forgets the gradients of an earlier step."""
        for layer in self.layers:
            if layer.dense is not None:
                layer.dense.grad = None
        if self.adding and self.summed is not None:
            self.summed.zero_()

    @torch.no_grad()
    def reduce(self) -> None:
        """From the weights' summed gradients to those of table and scales, in fp32."""
        if self.summed is None:
            raise RuntimeError("reduce() before begin()")
        lut, A, B = self._parts()
        d_A, d_B = torch.empty_like(A), torch.empty_like(B)
        if (kernels := _kernels(self.weight)) is not None:
            kernels.gradients(self.summed, self.indices, lut, A, B, self.grads["lut"], d_A, d_B)
        else:
            for n, grad in enumerate(self.summed):
                parts = linear.gradients(grad, self.indices[n], lut[n], A[n], B[n])
                for joint, value in zip((self.grads["lut"], d_A, d_B), parts, strict=True):
                    joint[n].copy_(value)
        self._distribute(d_A, d_B)

    def _distribute(self, d_A: Tensor, d_B: Tensor) -> None:
        """From the gradients of what entered the weight to those of A, g and B."""
        magnitude = self.rank_magnitude[:, None]
        if self.snap:
            norm = self._norms()
            d_A, d_B = d_A * norm.mT, d_B / norm
        torch.mul(d_A, magnitude, out=self.grads["scale_A"])
        torch.sum(d_A * self.scale_A, 1, out=self.grads["rank_magnitude"])
        self.grads["scale_B"].copy_(d_B)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Table, A·g and B as they enter the weight."""
        A = self.scale_A * self.rank_magnitude[:, None]
        if not self.snap:
            return self.lut, A, self.scale_B
        norm = self._norms()
        return _snapped(self.lut), _snapped(A * norm.mT), _snapped(self.scale_B / norm)

    def _norms(self) -> Tensor:
        """Norms [N, R, 1] of B's rows: an export in fp16 keeps them in A."""
        return self.scale_B.norm(dim=2, keepdim=True).clamp_min(1e-12)

    def _join(self, name: str) -> Tensor:
        """Puts one parameter of all layers into a joint tensor, each layer's own becoming a view."""
        joint = torch.stack([getattr(layer, name).detach() for layer in self.layers])
        for layer, view in zip(self.layers, joint, strict=True):
            setattr(layer, name, nn.Parameter(view, requires_grad=False))
        return joint

    def _set_grads(self, name: str, joint: Tensor) -> None:
        for layer, view in zip(self.layers, joint, strict=True):
            getattr(layer, name).grad = view

    def _take(self, index: int, weight: Tensor) -> None:
        """Moves a weight's new gradient into the sum, so that it is gone before the next layer's comes."""
        if self.summed is None or weight.grad is None:
            raise RuntimeError("backward before begin()")
        (self.summed[index].add_ if self.adding else self.summed[index].copy_)(weight.grad)
        weight.grad = None


def _snapped(x: Tensor) -> Tensor:
    return x.half().float()


def _kernels(weight: Tensor) -> Any:
    """The fused kernels where they run, else None."""
    if not weight.is_cuda:
        return None
    from qat.quant import kernels

    return kernels if kernels.AVAILABLE else None
