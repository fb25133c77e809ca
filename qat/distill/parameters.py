"""What learns, and at which rate: parts of quantized layers, latent weights and norms as one list of fp32 tensors.

The model itself only ever sees tensors in the compute type. `write` computes these from the fp32
parameters once a step, autograd fills in their gradients, and `reduce` turns those into gradients of the
parameters. Of several processes each does so for its own layers where latent weights learn (`qat.quant.shards`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qat.config import LearnConfig
from qat.errors import ConfigError
from qat.machine import Machine
from qat.norms import learned, norms, set_learned
from qat.processes import Ranks
from qat.quant.latent import PACES
from qat.quant.linear import Quantized
from qat.quant.shards import SharedWeights
from qat.quant.stack import stacks
from qat.quant.weights import Weights

NORMS, LATENT = "norms", "latent"  # kinds of parameters that are not parts of a format
TOGETHER = 1 << 30  # numbers of a gradient in one tensor: not every kernel counts beyond 2^31


@dataclass(frozen=True)
class Parameter:
    """A tensor that learns, fp32, with its gradient.

    Attributes:
        name: unique.
        kind: whose rate it has (a field of `train.learn`).
        value: itself; without memory where another process has it.
        pace: multiplies that rate.
        owner: the rank of the process that has it; None where all have it and make the same updates.
    """

    name: str
    kind: str
    value: Tensor
    pace: float = 1.0
    owner: int | None = None


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


class Learners:
    """Everything that learns.

    Attributes:
        parameters: in a fixed order, which training states rely on.
        shared: where processes have shares of the layers, what they share; else None.
    """

    def __init__(
        self,
        student: nn.Module,
        layers: dict[str, Quantized],
        learn: LearnConfig,
        machine: Machine,
        snap: bool,
        ranks: Ranks = Ranks(),  # noqa: B008 - immutable
    ) -> None:
        """Marks the tensors that learn.

        Args:
            student: the model; everything in it stays fixed but what is named here.
            layers: the quantized layers that learn, by name. Those that have latent weights to learn
                from must bring them if `learn.latent` is above 0, and the curvature of the loss there.
            learn: rates of the kinds relative to `train.lr`; 0 does not learn.
            machine: compute type.
            snap: parts of quantized layers pass through fp16.
            ranks: the processes that train together.

        Raises:
            ConfigError: there are more processes than parts of the model to share out.
        """
        student.requires_grad_(False)
        self._kinds = [field.name for field in fields(learn) if getattr(learn, field.name) > 0]
        inside = any(kind != NORMS for kind in self._kinds)
        self._weights = _weights(layers, learn, machine, ranks) if inside and layers else None
        self.shared = self._weights if isinstance(self._weights, SharedWeights) else None
        self._stacks = [] if self._weights is None else stacks(self._weights, snap)
        self._norms = Norms(student) if learn.norms > 0 else None
        self.parameters = [p for kind in self._kinds for p in self._of(kind, layers)]
        self._rank = ranks.rank

    @property
    def own(self) -> list[Parameter]:
        """Those that this process updates."""
        return [p for p in self.parameters if p.owner in (None, self._rank)]

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step of so many micro-batches."""
        if self._weights is not None:
            self._weights.begin(micro_batches)

    def write(self) -> None:
        """Computes what the model sees from the parameters, and forgets earlier gradients."""
        self.compute()
        self.exchange()
        self.arrive()

    def compute(self) -> None:
        """The part of `write` that this process does by itself."""
        for gradients in (self._weights, self._norms):
            if gradients is not None:
                gradients.clear()
        for stack in self._stacks:
            stack.write()
        if self._norms is not None:
            self._norms.write()

    def exchange(self) -> None:
        """Begins the part of `write` for which processes meet."""
        if self._weights is not None:
            self._weights.exchange()

    def arrive(self) -> None:
        """Ends it: from now on the model may compute."""
        if self._weights is not None:
            self._weights.arrive()

    def finish(self) -> None:
        """Ends a micro-batch's gradients."""
        if self._weights is not None:
            self._weights.finish()

    def collect(self) -> None:
        """Ends those of all micro-batches."""
        if self._weights is not None:
            self._weights.collect()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the first process has all that was learned."""
        if self.shared is None:
            yield
            return
        with self.shared.whole():
            yield

    def bring(self, tensor: Tensor, parameter: Parameter) -> Tensor:
        """A tensor of a parameter, for the first process in its host memory; elsewhere it is as it was.

        Args:
            tensor: its owner's; elsewhere any of its shape and type.
            parameter: whose it is.
        """
        if self.shared is None or parameter.owner is None:
            return tensor.detach().to("cpu", copy=True)
        return self.shared.bring(tensor, parameter.owner)

    def reduce(self) -> None:
        """Turns the gradients that autograd left into those of the parameters."""
        for stack in self._stacks:
            stack.reduce()

    def shift(self, factor: Tensor) -> None:
        """Multiplies latent weights' gradients by `factor` and takes them at the latent weights, not at entries."""
        for stack in self._stacks:
            stack.shift(factor)

    def grads(self) -> list[Tensor]:
        """Gradients of `own`, adjacent ones joined into one tensor: for norms and reductions."""
        return self.grads_of_layers() + self.grads_of_norms()

    def grads_of_layers(self) -> list[Tensor]:
        """Those of quantized layers, of which processes may have shares."""
        joint = [
            stack.grads[name]
            for stack in self._stacks
            for kind in self._kinds
            for name in _of_kind(stack.layers[0], kind)
            if name in stack.grads
        ]
        if self._weights is not None and self._weights.latent:
            joint += self._weights.sums.split(TOGETHER)
        return joint

    def grads_of_norms(self) -> list[Tensor]:
        """Those of norms, which every process has."""
        return [p.value.grad for p in self.parameters if p.kind == NORMS and p.value.grad is not None]

    def _of(self, kind: str, layers: dict[str, Quantized]) -> Iterable[Parameter]:
        if kind == NORMS:
            masters = self._norms.masters if self._norms is not None else {}
            return [Parameter(name, kind, value) for name, value in masters.items()]
        owners = {} if self.shared is None else self.shared.owners
        return [
            Parameter(f"{layer}.{name}", kind, getattr(module, name), _pace(module, kind), owners.get(module))
            for layer, module in layers.items()
            for name in _of_kind(module, kind)
        ]


def _weights(layers: dict[str, Quantized], learn: LearnConfig, machine: Machine, ranks: Ranks) -> Weights:
    """In shares where there is much to share: codebooks and scales alone are few numbers, quickly summed."""
    if ranks.count == 1 or learn.latent == 0:
        return Weights(list(layers.values()), machine.dtype, learn.latent > 0)
    try:
        return SharedWeights(layers, machine.dtype, ranks)
    except ValueError as error:
        raise ConfigError(f"{error}: use fewer (instance.devices), or let more layers learn (mode)") from None


def names(layers: dict[str, Quantized], learn: LearnConfig) -> set[str]:
    """The names of all that learns in some layers."""
    kinds = [field.name for field in fields(learn) if getattr(learn, field.name) > 0 and field.name != NORMS]
    return {f"{layer}.{name}" for layer, module in layers.items() for kind in kinds for name in _of_kind(module, kind)}


def _pace(layer: Quantized, kind: str) -> float:
    return PACES[layer.format.bits] if kind == LATENT else 1.0


def _of_kind(layer: Quantized, kind: str) -> list[str]:
    """The names of a layer's parameters that use the learning rate of a kind."""
    if kind == LATENT:
        return [LATENT]
    return [name for name, part in layer.format.parts(layer.outputs, layer.inputs).items() if part.kind == kind]
