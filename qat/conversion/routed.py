"""Observes experts: each gets only the tokens routed to it, and no module is called that could be hooked.

A stack of experts is a parameter, and what its matrices are multiplied with is seen where torch multiplies: the
right operand of such a product lies in the parameter's memory. Experts to which few tokens were sent have moments
that say little of their inputs; `filled` puts what all experts of their block have in common in the place of the
tokens that are missing.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.quant import experts
from qat.quant.architectures import INNER, Layer

log = logging.getLogger(__name__)

PRODUCTS = {
    nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}

Seen = Callable[[str, Tensor, Tensor, Callable[[Tensor], Tensor]], None]


@dataclass(frozen=True)
class Watched:
    """A stack of experts whose products are observed.

    Attributes:
        module, parameter: where it is.
        names: of the layers that are asked for, by number of the expert.
    """

    module: nn.Module
    parameter: str
    names: dict[int, str]

    def hit(self, operand: Tensor) -> list[int]:
        """The experts whose matrices are the operand; none if the operand lies outside of the stack."""
        whole: Tensor = getattr(self.module, self.parameter)
        if operand.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return []
        number, rest = divmod(int(operand.storage_offset() - whole.storage_offset()), whole.stride(0))
        if rest or not 0 <= number < len(whole):
            return []
        return [number] if operand.dim() == 2 else list(range(number, number + len(operand)))


class Products(TorchFunctionMode):
    """Inside, every product with a matrix of the stacks is reported to `seen`.

    `seen` gets the layer's name, the rows [X, I] that met it, the tensor that holds the products, and what takes the
    rows' own [X, O] out of a tensor like that one.
    """

    def __init__(self, stacks: Iterable[Watched], seen: Seen) -> None:
        super().__init__()
        self._stacks, self._seen = list(stacks), seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes the function as usual, and reports the product."""
        made = func(*args, **(kwargs or {}))
        if func in PRODUCTS and len(args) > 1:
            for stack in self._stacks:
                for place, number in enumerate(stack.hit(args[1])):
                    if name := stack.names.get(number):
                        self._tell(name, args[0], args[1].dim() == 3, place, made)
        return made

    def _tell(self, name: str, x: Tensor, batched: bool, place: int, made: Tensor) -> None:
        rows = x[place] if batched else x.flatten(0, -2)
        sent = rows.any(-1) if batched else None  # rows routed to other experts are zero here

        def own(values: Tensor) -> Tensor:
            mine = values[place] if batched else values.flatten(0, -2)
            return mine if sent is None else mine[sent]

        self._seen(name, rows if sent is None else rows[sent], made, own)


def watched(model: nn.Module, layers: list[Layer], inside: set[nn.Module]) -> list[Watched]:
    """The stacks in one part of a model that contain some of the layers."""
    found: dict[tuple[nn.Module, str], dict[int, str]] = defaultdict(dict)
    for layer in layers:
        if (stack := experts.home(model, layer.name)) and stack[0] in inside:
            found[stack[:2]][stack[2]] = layer.name
    return [Watched(*place, names) for place, names in found.items()]


@contextmanager
def one_by_one(stacks: list[Watched]) -> Iterator[None]:
    """Inside, experts run in the code of their own class, which multiplies with each matrix separately."""
    configs = [config for stack in stacks if (config := getattr(stack.module, "config", None)) is not None]
    before = [getattr(config, IMPLEMENTATION, None) for config in configs]
    for config in configs:
        setattr(config, IMPLEMENTATION, "eager")
    try:
        yield
    finally:
        for config, earlier in reversed(list(zip(configs, before, strict=True))):
            setattr(config, IMPLEMENTATION, earlier)


Key = tuple[str, bool]  # name of a source and False for H, name of a layer and True for G
IMPLEMENTATION = "_experts_implementation"  # name of the setting of transformers that selects the code of experts


@dataclass
class Routed:
    """The matrices of one stack: their names and the sources of their inputs, in order."""

    parameter: str
    names: list[str]
    sources: list[str]


def stacks(model: nn.Module, layers: list[Layer]) -> list[Routed]:
    """The stacks that contain some of the layers."""
    found: dict[tuple[nn.Module, str], Routed] = {}
    for layer in layers:
        if stack := experts.home(model, layer.name):
            routed = found.setdefault(stack[:2], Routed(stack[1], [], []))
            routed.names.append(layer.name)
            routed.sources.append(layer.source)
    return list(found.values())


def complete(
    stacks: list[Routed], moments: dict[Key, Tensor], weights: dict[Key, float], met: dict[Key, int], tokens: int
) -> int:
    """Completes the moments of the matrices of stacks; returns for how many that was needed.

    A matrix that met fewer tokens than it has inputs gets as many as it lacks of the mean over all experts; where
    the experts make their inputs themselves, which have nothing but their size in common, of that size in every
    direction. Gradients are counted among those of all tokens, to most of which an expert is nothing.

    Args:
        stacks: of the model.
        moments: by layer for G, by source for H, of those that met a token; the others' are added.
        weights: of a moment in a mean over all.
        met: tokens that were sent there.
        tokens: of the text.
    """
    few = sum(_inputs(stack, moments, weights, met) for stack in stacks)
    for stack in stacks:
        outputs = {name: moments[name, True] for name in stack.names if (name, True) in moments}
        for name in stack.names if outputs else ():
            share = met.get((name, True), 0) / tokens
            like = next(iter(outputs.values()))
            moments[name, True] = outputs[name] * share if name in outputs else torch.zeros_like(like)
    return few


def tell(few: int, stacks: list[Routed]) -> None:
    """Logs how many matrices of stacks met too few tokens."""
    if few:
        log.info(
            "%d of %d matrices of experts met fewer tokens than they have inputs: what all experts of their block have"
            " in common fills in; a larger convert.calibration_tokens sends them more",
            few,
            sum(len(stack.names) for stack in stacks),
        )


def _inputs(stack: Routed, moments: dict[Key, Tensor], weights: dict[Key, float], met: dict[Key, int]) -> int:
    """Completes the input moments of one stack and returns how many matrices needed it."""
    known = [(source, False) for source in stack.sources if met.get((source, False))]
    if not known:
        return 0
    whole = sum(weights[key] for key in known) or 1.0
    shared = torch.stack([moments[key] * (weights[key] / whole) for key in known]).sum(0)
    if stack.parameter in INNER:
        shared = shared.diagonal().mean() * torch.eye(len(shared), dtype=shared.dtype, device=shared.device)
    few = 0
    for key in [(source, False) for source in dict.fromkeys(stack.sources)]:
        lacking = len(shared) - met.get(key, 0)
        if lacking > 0:
            own = met[key] * moments[key] if met.get(key) else torch.zeros_like(shared)
            moments[key], few = (own + lacking * shared) / len(shared), few + 1
    return few
