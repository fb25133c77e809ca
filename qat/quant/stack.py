"""Weights of many layers of one shape, written at once; their gradients turned into those of the parts.

A model has hundreds of quantized layers of a handful of shapes. Side by side in memory, one kernel serves
all of one shape. The weights are written once a step, whatever the number of micro-batches; because they
are linear in each of their parts, one reduction of their summed gradients (`qat.quant.weights`) at the end
gives the parts' gradients exactly.

Shapes: N layers, O outputs, I inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quant.formats import Parts
from qat.quant.linear import Quantized
from qat.quant.weights import Weights


def stacks(weights: Weights, snap: bool = False) -> list["Stack"]:
    """The layers that are `own`, in as few stacks as they have formats and shapes, in order of first appearance."""
    alike: dict[Any, list[Quantized]] = {}
    for layer in weights.own:
        alike.setdefault((layer.format, layer.indices.shape), []).append(layer)
    return [Stack(members, weights, snap) for members in alike.values()]


class Stack:
    """Layers of one format and shape. Their parameters and indices become views into joint tensors.

    Attributes:
        format: of the layers.
        layers: the N modules.
        weights: where their weights and summed gradients lie.
        indices, latent: the layers' own, joined along N.
        parts: likewise, by name.
        curvature: [N, O] and [N, I], the layers' own; None without latent weights.
        grads: the gradients of the parts, by name; `grad` of each layer's parameter is a view into them.
    """

    def __init__(self, layers: list[Quantized], weights: Weights, snap: bool = False) -> None:
        """Joins the layers.

        Args:
            layers: of one format and shape, on one device.
            weights: these layers' and others'.
            snap: parts pass through fp16 on their way into the weight, gradients straight through, so
                that the student learns to live with an export in fp16.
        """
        self.format, self.layers, self.weights, self.snap = layers[0].format, layers, weights, snap
        self.indices = torch.stack([layer.indices for layer in layers])
        for layer, view in zip(layers, self.indices, strict=True):
            layer.indices = view
        self.parts = {name: self._join(name) for name in layers[0].parts()}
        self.latent = self._join("latent") if weights.latent else None
        self.curvature = self._curvature() if weights.latent else None
        self.grads = {name: torch.zeros_like(joint) for name, joint in self.parts.items()}
        for name, joint in self.grads.items():
            for layer, view in zip(layers, joint, strict=True):
                layer.get_parameter(name).grad = view
        self.starts = weights.starts(layers)

    @torch.no_grad()
    def write(self) -> None:
        """Computes every weight; before that the indices, where they learn."""
        operands = self.format.operands(self.parts, self.snap)
        if (fused := self.format.kernels(self.indices.device)) is not None:
            fused.write(self.indices, operands, self.latent, self.weights.written, self.starts)
            return
        for n, (layer, indices) in enumerate(zip(self.layers, self.indices, strict=True)):
            grid = self.format.grid(_of(operands, n))
            if self.latent is not None:
                indices.copy_(grid.nearest(self.latent[n]))
            self.weights.value(layer).copy_(grid.at(indices))

    @torch.no_grad()
    def reduce(self) -> None:
        """Turns the weights' summed gradients into those of the parts, in fp32."""
        operands = self.format.operands(self.parts, self.snap)
        found = {name: self.grads[name] if name in self.grads else torch.empty_like(x) for name, x in operands.items()}
        if (fused := self.format.kernels(self.indices.device)) is not None:
            fused.gradients(self.weights.sums, self.starts, self.indices, operands, found)
        else:
            for n, layer in enumerate(self.layers):
                one = self.format.gradients(self.weights.sum(layer), self.indices[n], _of(operands, n))
                for name, value in one.items():
                    found[name][n].copy_(value)
        self.format.distribute(found, self.parts, self.grads, self.snap)

    @torch.no_grad()
    def shift(self, factor: Tensor) -> None:
        """Corrects the summed gradients from the weights to the latent weights (`qat.quant.latent`).

        Args:
            factor: fp32 scalar by which the gradients are multiplied.
        """
        if self.latent is None or self.curvature is None:
            return
        outputs, inputs = self.curvature
        if (kernels := _kernels(self.latent)) is not None:
            weights = self.weights
            kernels.shift(weights.sums, weights.written, self.starts, self.latent, outputs, inputs, factor)
            return
        for n, layer in enumerate(self.layers):
            away = self.latent[n] - self.weights.value(layer)
            self.weights.sum(layer).addcmul_(away.mul_((factor * outputs[n])[:, None]), inputs[n])

    def _curvature(self) -> tuple[Tensor, Tensor]:
        pairs = [layer.curvature for layer in self.layers if layer.curvature is not None]
        if len(pairs) < len(self.layers):
            raise RuntimeError("latent weights without the curvature of their loss")
        outputs, inputs = zip(*pairs, strict=True)
        return torch.stack(outputs), torch.stack(inputs)

    def _join(self, name: str) -> Tensor:
        """Puts one parameter of all layers into a joint tensor; each layer's own becomes a view of it."""
        joint = torch.stack([getattr(layer, name).detach() for layer in self.layers])
        for layer, view in zip(self.layers, joint, strict=True):
            setattr(layer, name, nn.Parameter(view, requires_grad=False))
        return joint


def _of(operands: Parts, n: int) -> Parts:
    """The operands of layer n."""
    return {name: joint[n] for name, joint in operands.items()}


def _kernels(x: Tensor) -> Any:
    """The fused kernel on CUDA, else None."""
    if not x.is_cuda:
        return None
    from qat.quant import kernels

    return kernels if kernels.AVAILABLE else None
