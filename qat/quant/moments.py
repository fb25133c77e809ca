"""Second moments on calibration text: how much an error in each direction of a weight matters.

`H` is the mean of x xᵀ over a layer's inputs x. With gradients, `G` is the mean of g gᵀ over the loss's
gradients g at its outputs, the loss being the surprise at next tokens drawn from the model itself (the true
Fisher information, Martens & Grosse 2015), and inputs are weighed by the size of the gradient that meets
them (Kim et al. 2025, "GuidedQuant", arXiv 2505.07004, which weighs by its square; the root lets fewer
tokens decide and did better here). All in full fp32: TF32 ruins the fit that follows.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cache.reader import Batch
from qat.console import progress
from qat.errors import NumericsError
from qat.machine import exact_matmul
from qat.quant.layers import Layer
from qat.quant.linear import baked

POSITIONS = 256  # whose logits over the vocabulary exist at one time


@dataclass(frozen=True)
class Moments:
    """fp32 matrices in host memory.

    Attributes:
        inputs: H [I, I] by the name of each layer's `source`.
        outputs: G [O, O] by the name of each layer; empty when gradients were not asked for.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def gather(model: PreTrainedModel, layers: list[Layer], text: list[Batch], gradients: bool = False) -> Moments:
    """The moments of the given layers of a model, quantized or not, over some text in micro-batches.

    Raises:
        NumericsError: an input or a gradient is NaN or infinite.
    """
    tokens = sum(batch.input_ids.numel() for batch in text)
    observer = _Observer(model, layers, tokens, gradients)
    draw = torch.Generator().manual_seed(0)
    with (
        torch.set_grad_enabled(gradients),
        exact_matmul(),
        observer.watching(),
        baked(model, model.dtype),
        progress("layer curvature" if gradients else "layer inputs", tokens, "tokens") as advance,
    ):
        for batch in text:
            hidden = model.base_model(**batch.to(model.device).inputs()).last_hidden_state
            if gradients:
                uniform = torch.rand(hidden.shape[:2], generator=draw)  # the same for any micro-batch
                hidden.backward(_surprise(model, hidden.detach(), uniform.to(model.device)))
            advance(batch.input_ids.numel())
    return observer.moments()


def _surprise(model: PreTrainedModel, hidden: Tensor, uniform: Tensor) -> Tensor:
    """Gradient with respect to the hidden states of −log p(token), each token drawn from p by a uniform number."""
    slopes = []
    for states, u in zip(hidden.flatten(0, 1).split(POSITIONS), uniform.flatten().split(POSITIONS), strict=True):
        states = states.requires_grad_()
        logits = model.lm_head(states).float()
        below = logits.detach().softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(below, (u * below[:, -1])[:, None]).clamp_max(logits.shape[-1] - 1)
        surprise = nn.functional.cross_entropy(logits, tokens[:, 0], reduction="sum")
        slopes += torch.autograd.grad(surprise, states)
    return torch.cat(slopes).view_as(hidden)


class _Observer:
    """Sums products of what flows through the layers of a model."""

    def __init__(self, model: PreTrainedModel, layers: list[Layer], tokens: int, gradients: bool) -> None:
        self.model, self.tokens, self.gradients = model, tokens, gradients
        self.readers: dict[str, list[str]] = defaultdict(list)  # layers by the source of their input
        for layer in layers:
            self.readers[layer.source].append(layer.name)
        self.H: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.weight: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._squares: dict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for as long as the block lasts."""
        model, hooks = self.model, []
        for source, names in self.readers.items():
            hooks.append(model.get_submodule(source).register_forward_pre_hook(self._input_of(source)))
            if self.gradients:
                hooks += [
                    model.get_submodule(name).register_forward_hook(self._output_of(source, name)) for name in names
                ]
        if self.gradients:  # frozen weights: a graph starts where something asks for gradients
            embeddings = model.get_input_embeddings()
            hooks.append(embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def moments(self) -> Moments:
        """The means, in host memory."""
        inputs = {name: (self.H.pop(name) / self.weight[name].clamp_min(1e-30)).cpu() for name in list(self.H)}
        outputs = {name: (self.G.pop(name) / self.tokens).cpu() for name in list(self.G)}
        for name, moment in [*inputs.items(), *outputs.items()]:
            if not torch.isfinite(moment).all():
                what = "gradient at the output" if name in outputs else "input"
                raise NumericsError(f"the {what} of {name} holds NaN or infinity: try instance.precision=fp32")
        return Moments(inputs, outputs)

    def _input_of(self, source: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)
            if self.gradients:
                self._inputs[source] = x
            else:
                self._add_input(source, x, torch.ones(len(x), device=x.device))

        return hook

    def _output_of(self, source: str, name: str):  # type: ignore[no-untyped-def]
        def arrived(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float()
            self.G[name] = _added(self.G.get(name), g, g)
            self._squares[source].append(g.square().mean(1))
            if len(self._squares[source]) == len(self.readers[source]):
                sizes = torch.stack(self._squares.pop(source)).sum(0).sqrt()
                self._add_input(source, self._inputs.pop(source), sizes)

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(arrived)

        return hook

    def _add_input(self, source: str, x: Tensor, weight: Tensor) -> None:
        x = x.float()
        self.H[source] = _added(self.H.get(source), x * weight[:, None], x)
        self.weight[source] = self.weight.get(source, torch.zeros((), device=x.device)) + weight.sum()


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + leftᵀ right`, in place."""
    if total is None:
        return left.mT @ right
    return total.addmm_(left.mT, right)
