"""Second moments on calibration text: how much an error in each direction of a weight matters.

`H` is the mean of x xᵀ over a layer's inputs x. With gradients, `G` is the mean of g gᵀ over the loss's
gradients g at its outputs, the loss being the surprise at next tokens drawn from the model itself (the true
Fisher information, Martens & Grosse 2015), and inputs are weighed by the size of the gradient that meets
them (Kim et al. 2025, "GuidedQuant", arXiv 2505.07004, which weighs by its square; the root lets fewer
tokens decide and did better here). All in full fp32: TF32 ruins the fit that follows.

A GPU needs at most 2 GB for this beside the model. The moments of Qwen3-0.6B's layers are 4.8 GB, so the
text passes through the model several times, each time for as many layers as `MOST_BYTES` of moments hold;
of activations only the inputs of decoder layers are kept, and one layer's are computed again at a time.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qat.cache.reader import Batch
from qat.console import progress
from qat.errors import NumericsError
from qat.machine import exact_matmul
from qat.quant.layers import Layer
from qat.quant.linear import baked

LOGITS = 1 << 22  # that exist at one time
STATES = 1 << 20  # numbers in the hidden states that pass through the model at one time
MOST_BYTES = 1.1e9  # of moments that are summed on a GPU in one pass over the text


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
    passes = list(_passes(layers, gradients, MOST_BYTES if model.device.type == "cuda" else math.inf))
    tokens, found = sum(batch.input_ids.numel() for batch in text), Moments()
    what = "layer curvature" if gradients else "layer inputs"
    with (
        torch.set_grad_enabled(gradients),
        exact_matmul(),
        baked(model, model.dtype),
        progress(what, tokens * len(passes), "tokens") as advance,
    ):
        for some in passes:
            observer = _Observer(model, some, tokens, gradients)
            draw = torch.Generator().manual_seed(0)
            with observer.watching():
                for batch in _small(text, model):
                    _observe(model, batch, draw if gradients else None)
                    advance(batch.input_ids.numel())
            observer.add_to(found)
    return found


def _passes(layers: list[Layer], gradients: bool, most_bytes: float) -> Iterator[list[Layer]]:
    """The layers in lists whose moments take at most so many bytes; those that share an input stay together."""
    together: list[Layer] = []
    for _, readers in groupby(layers, key=lambda layer: layer.source):
        more = list(readers)
        if together and _bytes(together + more, gradients) > most_bytes:
            yield together
            together = []
        together += more
    yield together


def _bytes(layers: list[Layer], gradients: bool) -> int:
    inputs = {layer.source: layer.shape[1] ** 2 for layer in layers}
    outputs = [layer.shape[0] ** 2 for layer in layers if gradients]
    return 4 * (sum(inputs.values()) + sum(outputs))


def _small(text: list[Batch], model: PreTrainedModel) -> Iterator[Batch]:
    """The text in micro-batches that are no larger than memory for their activations asks for."""
    for batch in text:
        rows, length = batch.input_ids.shape
        parts = math.ceil(rows * length * model.config.hidden_size / STATES)
        yield from batch.split(math.ceil(rows / parts))


def _observe(model: PreTrainedModel, batch: Batch, draw: torch.Generator | None) -> None:
    """Forward, and backward from labels that are drawn if there is something to draw them with."""
    hidden = model.base_model(**batch.to(model.device).inputs()).last_hidden_state
    if draw is not None:
        uniform = torch.rand(hidden.shape[:2], generator=draw)  # the same for any micro-batch
        hidden.backward(_surprise(model, hidden.detach(), uniform.to(model.device)))


def _surprise(model: PreTrainedModel, hidden: Tensor, uniform: Tensor) -> Tensor:
    """Gradient with respect to the hidden states of −log p(token), each token drawn from p by a uniform number."""
    slopes, positions = [], max(1, LOGITS // model.config.vocab_size)
    for states, u in zip(hidden.flatten(0, 1).split(positions), uniform.flatten().split(positions), strict=True):
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
            _compute_twice(model)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _compute_once(model)

    def add_to(self, found: Moments) -> None:
        """The means, in host memory."""
        inputs = {name: (self.H.pop(name) / self.weight[name].clamp_min(1e-30)).cpu() for name in list(self.H)}
        outputs = {name: (self.G.pop(name) / self.tokens).cpu() for name in list(self.G)}
        for name, moment in [*inputs.items(), *outputs.items()]:
            if not torch.isfinite(moment).all():
                what = "gradient at the output" if name in outputs else "input"
                raise NumericsError(f"the {what} of {name} holds NaN or infinity: try instance.precision=fp32")
        found.inputs.update(inputs)
        found.outputs.update(outputs)

    def _input_of(self, source: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)
            if not self.gradients:
                self._add_input(source, x, torch.ones(len(x), device=x.device))
            elif torch.is_grad_enabled():
                self._inputs[source] = x

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
            if torch.is_grad_enabled():  # not when the layer is computed for the first of two times
                output.register_hook(arrived)

        return hook

    def _add_input(self, source: str, x: Tensor, weight: Tensor) -> None:
        x = x.float()
        self.H[source] = _added(self.H.get(source), x * weight[:, None], x)
        self.weight[source] = self.weight.get(source, torch.zeros((), device=x.device)) + weight.sum()


def _compute_twice(model: PreTrainedModel) -> None:
    """Keeps only the inputs of decoder layers for the backward pass; each is computed again, with gradients, there.

    In the form that runs a whole layer again before anything flows back through it: inputs are then at hand
    when gradients arrive.
    """
    base: Any = model.base_model
    for layer in base.layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Any, states_BLD: Tensor, **rest: Any) -> Any:
    return checkpoint(partial(forward, **rest), states_BLD, use_reentrant=True, preserve_rng_state=False)


def _compute_once(model: PreTrainedModel) -> None:
    base: Any = model.base_model
    for layer in base.layers:
        vars(layer).pop("forward", None)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + leftᵀ right`, in place."""
    if total is None:
        return left.mT @ right
    return total.addmm_(left.mT, right)
