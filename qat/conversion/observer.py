"""Watches one decoder layer: sums of products of what flows through its linear layers."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qat.conversion.products import add_square, mirrored
from qat.conversion.routed import Products, one_by_one, watched
from qat.quant import experts
from qat.quant.architectures import Layer


@dataclass(frozen=True)
class Mean:
    """A weighted mean of products over some tokens: G of the layer `name`, or H of the source `name`."""

    name: str
    output: bool
    moment: Tensor
    weight: float
    tokens: int


@dataclass
class _Call:
    """One input [X, I] of layers that share it, and the size of the gradients so far, for each of these layers."""

    inputs: Tensor
    squares: list[Tensor] = field(default_factory=list)


class Observer:
    """Sums products of what flows through the linear layers of one decoder layer."""

    def __init__(self, decoder: nn.Module, model: nn.Module, layers: list[Layer]) -> None:
        self.model, inside = model, set(decoder.modules())
        self.stacks = watched(model, layers, inside)
        routed = {name for stack in self.stacks for name in stack.names.values()}
        self.sources = {layer.name: layer.source for layer in layers if layer.name in routed}
        self.readers: dict[str, list[str]] = defaultdict(list)  # layers by the source of their input
        for layer in layers:
            elsewhere = layer.name not in routed and experts.home(model, layer.name) is not None
            if layer.name in routed or (not elsewhere and model.get_submodule(layer.name) in inside):
                self.readers[layer.source].append(layer.name)
        self.totals: dict[tuple[str, bool], Tensor] = {}
        self.weights: dict[tuple[str, bool], Tensor] = {}
        self.tokens: dict[tuple[str, bool], int] = defaultdict(int)
        self._calls: dict[str, _Call] = {}  # the latest call of each source

    @contextmanager
    def watching(self, gradients: bool) -> Iterator[None]:
        """Installs the hooks while the block runs."""
        find, hooks = self.model.get_submodule, []
        for source, names in self.readers.items():
            if names[0] in self.sources:
                continue
            hooks.append(self._reader(source).register_forward_pre_hook(self._input_of(source, gradients)))
            if gradients:
                hooks += [find(name).register_forward_hook(self._output_of(source, name)) for name in names]
        seen = partial(self._routed, gradients)
        try:
            with one_by_one(self.stacks), Products(self.stacks, seen) if self.stacks else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, source: str) -> nn.Module:
        """The layer at which an input is observed: the layer `source`, if the model has it."""
        names = {name for name, _ in self.model.named_modules()}
        return self.model.get_submodule(source if source in names else self.readers[source][0])

    @property
    def names(self) -> set[str]:
        """The layers that are watched."""
        return {name for names in self.readers.values() for name in names}

    def means(self) -> list[Mean]:
        """What was seen, in host memory."""
        found = []
        for key in list(self.totals):
            moment = mirrored(self.totals.pop(key)).div_(self.weights[key].clamp_min(1e-30))
            found.append(Mean(*key, moment.cpu(), float(self.weights[key]), self.tokens[key]))
        return found

    def _input_of(self, source: str, gradients: bool):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)
            if gradients:
                self._calls[source] = _Call(x)
            else:
                self._add((source, False), x)

        return hook

    def _output_of(self, source: str, name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._await(source, name, output, lambda gradient: gradient.flatten(0, -2))

        return hook

    def _await(self, source: str, name: str, output: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        """Adds the gradient that will arrive at an output; `own` takes the layer's own rows [X, O] from it."""
        call = self._calls[source]

        def arrived(gradient: Tensor) -> None:
            g = own(gradient)
            self._add((name, True), g)
            sizes = torch.linalg.vector_norm(g, dim=1, dtype=torch.float32)
            call.squares.append(sizes.square() / g.shape[1])
            if len(call.squares) == len(self.readers[source]):
                self._add((source, False), call.inputs, torch.stack(call.squares).sum(0).sqrt())

        output.register_hook(arrived)

    def _routed(
        self, gradients: bool, name: str, x: Tensor, output: Tensor, own: Callable[[Tensor], Tensor]
    ) -> None:
        """Takes the inputs that an expert got, and the gradients at its outputs."""
        source = self.sources[name]
        first = self.readers[source][0] == name
        if not gradients:
            if first:
                self._add((source, False), x.detach())
        elif output.requires_grad:
            if first:
                self._calls[source] = _Call(x.detach())
            self._await(source, name, output, own)

    def _add(self, key: tuple[str, bool], x: Tensor, weight: Tensor | None = None) -> None:
        if key not in self.totals:
            self.totals[key] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            self.weights[key] = torch.zeros((), dtype=torch.float32, device=x.device)
        add_square(self.totals[key], x, weight)
        self.tokens[key] += len(x)
        self.weights[key] += len(x) if weight is None else weight.sum()
