"""What learns, and at which rate: parts of quantized layers, latent weights, norms, adapters; all of it fp32 tensors.

The model itself only ever sees tensors in the compute type. `write` computes these from the fp32
parameters once a step, autograd fills in their gradients, and `reduce` turns those into gradients of the
parameters.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qat.config import LearnConfig
from qat.machine import Machine
from qat.norms import learned, norms, set_learned
from qat.quant.adapter import Adapter
from qat.quant.latent import PACES
from qat.quant.linear import Quantized, QuantLinear
from qat.quant.stack import stacks
from qat.quant.weights import Weights

NORMS, LATENT, ADAPTERS = "norms", "latent", "adapters"  # kinds of parameters that are not parts of a format


@dataclass(frozen=True)
class Parameter:
    """A tensor that learns, fp32, with its gradient.

    Attributes:
        name: unique.
        kind: whose rate it has (a field of `train.learn`); adapters have `train.lr` as it is.
        value: itself.
        pace: multiplies that rate.
    """

    name: str
    kind: str
    value: Tensor
    pace: float = 1.0


class Norms:
    """Weights of normalisation layers, which learn as fp32 copies of those in the model."""

    def __init__(self, model: nn.Module) -> None:
        """Starts from the fp32 values that the layers learned before, else from their weights."""
        self.weights = {f"{name}.weight": cast(nn.Parameter, module.weight) for name, module in norms(model).items()}
        start = {name: weight.detach().float().clone() for name, weight in self.weights.items()}
        set_learned(model, start | learned(model))
        self.masters = learned(model)
        for name, weight in self.weights.items():
            self.masters[name].grad = torch.zeros_like(self.masters[name])
            weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._take, name))

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the copies into the model."""
        for name, weight in self.weights.items():
            weight.copy_(self.masters[name])

    def clear(self) -> None:
        """Clears the gradients of an earlier step."""
        for name, weight in self.weights.items():
            weight.grad = None
            self._grad(name).zero_()

    def _take(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            self._grad(name).add_(weight.grad)
        weight.grad = None

    def _grad(self, name: str) -> Tensor:
        grad = self.masters[name].grad
        if grad is None:
            raise RuntimeError(f"{name} lost its gradient")
        return grad


class Adapters:
    """Low-rank adapters, to whose fp32 tensors autograd itself adds gradients.

    Attributes:
        parameters: `<layer>.A` and `<layer>.B`.
        grads: of all of them, one tensor; `grad` of each is a view into it.
    """

    def __init__(self, layers: dict[str, Adapter]) -> None:
        """Lets them learn."""
        named = {f"{layer}.{name}": value for layer, one in layers.items() for name, value in one.named_parameters()}
        self.parameters = [Parameter(name, ADAPTERS, value.requires_grad_()) for name, value in named.items()]
        values = list(named.values())
        self.grads = values[0].new_zeros(sum(value.numel() for value in values))
        for value, view in zip(values, self.grads.split([value.numel() for value in values]), strict=True):
            value.grad = view.view_as(value)


class Learners:
    """Everything that learns.

    Attributes:
        parameters: in a fixed order, which training states rely on.
    """

    def __init__(
        self, student: nn.Module, layers: dict[str, Quantized], learn: LearnConfig, machine: Machine, snap: bool
    ) -> None:
        """Marks the tensors that learn.

        Args:
            student: the model; everything in it stays fixed but what is named here.
            layers: the quantized layers that learn, by name. Those that have latent weights to learn
                from must bring them if `learn.latent` is above 0, and the curvature of the loss there. Where
                they have adapters, these learn and nothing else does.
            learn: rates of the kinds relative to `train.lr`; 0 does not learn.
            machine: compute type.
            snap: parts of quantized layers pass through fp16.
        """
        student.requires_grad_(False)
        adapters = {name: one.adapter for name, one in layers.items() if isinstance(one, QuantLinear) and one.adapter}
        self._adapters = Adapters(adapters) if adapters else None
        self._kinds = [] if adapters else [field.name for field in fields(learn) if getattr(learn, field.name) > 0]
        inside = any(kind != NORMS for kind in self._kinds)
        self._weights = Weights(list(layers.values()), machine.dtype, learn.latent > 0) if inside and layers else None
        self._stacks = [] if self._weights is None else stacks(self._weights, snap)
        self._norms = Norms(student) if NORMS in self._kinds else None
        self.parameters = [p for kind in self._kinds for p in self._of(kind, layers)]
        if self._adapters is not None:
            self.parameters += self._adapters.parameters

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step of so many micro-batches."""
        if self._weights is not None:
            self._weights.begin(micro_batches)

    def write(self) -> None:
        """Computes what the model sees from the parameters, and forgets earlier gradients."""
        for gradients in (self._weights, self._norms):
            if gradients is not None:
                gradients.clear()
        if self._adapters is not None:
            self._adapters.grads.zero_()
        for stack in self._stacks:
            stack.write()
        if self._norms is not None:
            self._norms.write()

    def reduce(self) -> None:
        """Turns the gradients that autograd left into those of the parameters."""
        for stack in self._stacks:
            stack.reduce()

    def shift(self, factor: Tensor) -> None:
        """Multiplies latent weights' gradients by `factor` and takes them at the latent weights, not at entries."""
        for stack in self._stacks:
            stack.shift(factor)

    def grads(self) -> list[Tensor]:
        """Gradients of all parameters, adjacent ones joined into one tensor: for norms and reductions."""
        joint = [
            stack.grads[name]
            for stack in self._stacks
            for kind in self._kinds
            for name in _of_kind(stack.layers[0], kind)
            if name in stack.grads
        ]
        if self._weights is not None and self._weights.latent:
            joint.append(self._weights.sums)
        if self._adapters is not None:
            joint.append(self._adapters.grads)
        return joint + [p.value.grad for p in self.parameters if p.kind == NORMS and p.value.grad is not None]

    def _of(self, kind: str, layers: dict[str, Quantized]) -> Iterable[Parameter]:
        if kind == NORMS:
            masters = self._norms.masters if self._norms is not None else {}
            return [Parameter(name, kind, value) for name, value in masters.items()]
        return [
            Parameter(f"{layer}.{name}", kind, getattr(module, name), _pace(module, kind))
            for layer, module in layers.items()
            for name in _of_kind(module, kind)
        ]


def _pace(layer: Quantized, kind: str) -> float:
    return PACES[layer.format.bits] if kind == LATENT else 1.0


def _of_kind(layer: Quantized, kind: str) -> list[str]:
    """The names of a layer's parameters that use the learning rate of a kind."""
    if kind == LATENT:
        return [LATENT]
    return [name for name, part in layer.format.parts(layer.outputs, layer.inputs).items() if part.kind == kind]
