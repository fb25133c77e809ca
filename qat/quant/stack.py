"""Weights of many layers of one shape, written at once; their gradients turned into those of the parts.

A model has hundreds of quantized layers of a handful of shapes. Side by side in memory, one kernel serves
all of one shape. The weights are written once a step, whatever the number of micro-batches; because they
are linear in each of their parts, one reduction of their summed gradients (`qat.quant.weights`) at the end
gives the parts' gradients exactly.

Shapes: N layers, O outputs, I inputs, K table entries, R ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quant import linear
from qat.quant.linear import QuantLinear
from qat.quant.weights import Weights

PARTS = ("lut", "scale_A", "scale_B", "rank_magnitude")


def stacks(weights: Weights, snap: bool = False) -> list["Stack"]:
    """Layers in as few stacks as they have shapes, in order of first appearance."""
    alike: dict[Any, list[QuantLinear]] = {}
    for layer in weights.layers:
        alike.setdefault((layer.indices.shape, layer.lut.shape, layer.rank_magnitude.shape), []).append(layer)
    return [Stack(members, weights, snap) for members in alike.values()]


class Stack:
    """Layers of one shape. Their parameters and indices become views into joint tensors.

    Attributes:
        layers: the N modules.
        weights: where their weights and summed gradients lie.
        indices, lut, scale_A, scale_B, rank_magnitude, latent: the layers' own, joined along N.
        curvature: [N, O] and [N, I], the layers' own; None without latent weights.
        grads: the gradients of tables and scales, by name; `grad` of each layer's parameter is a view into them.
    """

    def __init__(self, layers: list[QuantLinear], weights: Weights, snap: bool = False) -> None:
        """Joins the layers.

        Args:
            layers: of one shape, table size and rank, on one device.
            weights: these layers' and others'.
            snap: tables and scales pass through fp16 on their way into the weight, gradients straight
                through, so that the student learns to live with an export in fp16.
        """
        self.layers, self.weights, self.snap = layers, weights, snap
        self.indices = torch.stack([layer.indices for layer in layers])
        for layer, view in zip(layers, self.indices, strict=True):
            layer.indices = view
        self.lut, self.scale_A, self.scale_B, self.rank_magnitude = (self._join(name) for name in PARTS)
        self.latent = self._join("latent") if weights.latent else None
        self.curvature = self._curvature() if weights.latent else None
        self.grads = {name: torch.zeros_like(getattr(self, name)) for name in PARTS}
        for name, joint in self.grads.items():
            for layer, view in zip(layers, joint, strict=True):
                getattr(layer, name).grad = view
        self.starts = weights.starts(layers)

    @torch.no_grad()
    def write(self) -> None:
        """Computes every weight, and before that the indices where they learn."""
        lut, A, B = self._parts()
        if (kernels := _kernels(self.lut)) is not None:
            kernels.write(self.indices, lut, A, B, self.latent, self.weights.values, self.starts)
            return
        for n, indices in enumerate(self.indices):
            scale = A[n] @ B[n]
            if self.latent is not None:
                indices.copy_(linear.nearest(self.latent[n], lut[n], scale))
            torch.mul(linear.look_up(lut[n], indices), scale, out=scale)
            self.weights.value(self.layers[n]).copy_(scale)

    @torch.no_grad()
    def reduce(self) -> None:
        """From the weights' summed gradients to those of table and scales, in fp32."""
        lut, A, B = self._parts()
        d_A, d_B = torch.empty_like(A), torch.empty_like(B)
        if (kernels := _kernels(self.lut)) is not None:
            kernels.gradients(self.weights.sums, self.starts, self.indices, lut, A, B, self.grads["lut"], d_A, d_B)
        else:
            for n, layer in enumerate(self.layers):
                parts = linear.gradients(self.weights.sum(layer), self.indices[n], lut[n], A[n], B[n])
                for joint, value in zip((self.grads["lut"], d_A, d_B), parts, strict=True):
                    joint[n].copy_(value)
        self._distribute(d_A, d_B)

    @torch.no_grad()
    def shift(self, factor: Tensor) -> None:
        """Takes the summed gradients from where the weights are to where the latent weights are (`qat.quant.latent`).

        Args:
            factor: fp32 scalar by which the gradients are multiplied.
        """
        if self.latent is None or self.curvature is None:
            return
        outputs, inputs = self.curvature
        if (kernels := _kernels(self.lut)) is not None:
            weights = self.weights
            kernels.shift(weights.sums, weights.values, self.starts, self.latent, outputs, inputs, factor)
            return
        for n, layer in enumerate(self.layers):
            away = self.latent[n] - self.weights.value(layer)
            self.weights.sum(layer).addcmul_(away.mul_((factor * outputs[n])[:, None]), inputs[n])

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

    def _curvature(self) -> tuple[Tensor, Tensor]:
        pairs = [layer.curvature for layer in self.layers if layer.curvature is not None]
        if len(pairs) < len(self.layers):
            raise RuntimeError("latent weights without the curvature of their loss")
        outputs, inputs = zip(*pairs, strict=True)
        return torch.stack(outputs), torch.stack(inputs)

    def _join(self, name: str) -> Tensor:
        """Puts one parameter of all layers into a joint tensor, each layer's own becoming a view."""
        joint = torch.stack([getattr(layer, name).detach() for layer in self.layers])
        for layer, view in zip(self.layers, joint, strict=True):
            setattr(layer, name, nn.Parameter(view, requires_grad=False))
        return joint


def _snapped(x: Tensor) -> Tensor:
    return x.half().float()


def _kernels(x: Tensor) -> Any:
    """The fused kernels where they run, else None."""
    if not x.is_cuda:
        return None
    from qat.quant import kernels

    return kernels if kernels.AVAILABLE else None
