"""Watches one decoder layer: sums of products of what flows through its linear layers."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qat.convert.products import add_square, mirrored
from qat.convert.transfer import to_host
from qat.quant.architectures import Layer


@dataclass(frozen=True)
class Mean:
    """The mean of products over some tokens: `name` a layer for G, a source for H."""

    name: str
    output: bool
    moment: Tensor
    weight: float


@dataclass
class _Call:
    """One input of layers that share it, [X, I], and how large the gradients are that met it so far, a layer each."""

    inputs: Tensor
    squares: list[Tensor] = field(default_factory=list)


class Observer:
    """Sums products of what flows through the linear layers of one decoder layer."""

    def __init__(self, decoder: nn.Module, model: nn.Module, layers: list[Layer]) -> None:
        self.model, inside = model, set(decoder.modules())
        self.readers: dict[str, list[str]] = defaultdict(list)  # layers by the source of their input
        for layer in layers:
            if model.get_submodule(layer.name) in inside:
                self.readers[layer.source].append(layer.name)
        self.totals: dict[tuple[str, bool], Tensor] = {}
        self.weights: dict[tuple[str, bool], Tensor] = {}
        self._calls: dict[str, _Call] = {}  # the last one of each source

    @contextmanager
    def watching(self, gradients: bool) -> Iterator[None]:
        """Hooks for as long as the block lasts."""
        find, hooks = self.model.get_submodule, []
        for source, names in self.readers.items():
            hooks.append(self._reader(source).register_forward_pre_hook(self._input_of(source, gradients)))
            if gradients:
                hooks += [find(name).register_forward_hook(self._output_of(source, name)) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, source: str) -> nn.Module:
        """The layer at which an input is seen: the one it is named after, where the model has it."""
        names = {name for name, _ in self.model.named_modules()}
        return self.model.get_submodule(source if source in names else self.readers[source][0])

    def means(self) -> Callable[[], list[Mean]]:
        """Gives a function that gives the means in host memory; see `to_host`."""
        if not self.totals:
            return list
        moments = [mirrored(total).div_(self.weights[key].clamp_min(1e-30)) for key, total in self.totals.items()]
        weights = torch.stack([self.weights[key] for key in self.totals])
        arriving, keys = to_host([*moments, weights]), list(self.totals)

        def arrived() -> list[Mean]:
            *moments, weights = arriving()
            return [Mean(*key, *mean) for key, *mean in zip(keys, moments, weights.tolist(), strict=True)]

        return arrived

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
            call = self._calls[source]

            def arrived(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2)
                self._add((name, True), g)
                sizes = torch.linalg.vector_norm(g, dim=1, dtype=torch.float32)
                call.squares.append(sizes.square() / g.shape[1])
                if len(call.squares) == len(self.readers[source]):
                    self._add((source, False), call.inputs, torch.stack(call.squares).sum(0).sqrt())

            output.register_hook(arrived)

        return hook

    def _add(self, key: tuple[str, bool], x: Tensor, weight: Tensor | None = None) -> None:
        if key not in self.totals:
            self.totals[key] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            self.weights[key] = torch.zeros((), dtype=torch.float32, device=x.device)
        add_square(self.totals[key], x, weight)
        self.weights[key] += len(x) if weight is None else weight.sum()
