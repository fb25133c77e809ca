"""Second moments on calibration text: how much an error in each direction of a weight matters.

`H` is the mean of x xᵀ over a layer's inputs x. With gradients, `G` is the mean of g gᵀ over the loss's
gradients g at its outputs, the loss being the surprise at next tokens drawn from the model itself (the true
Fisher information, Martens & Grosse 2015), and inputs are weighed by the size of the gradient that meets
them (Kim et al. 2025, "GuidedQuant", arXiv 2505.07004, which weighs by its square; the root lets fewer
tokens decide and did better here). Sums are exact products added up in fp32 (`qat/convert/products.py`).

One decoder layer at a time takes the whole text, so the moments of one are on the device at a time. For
gradients the inputs of decoder layers must be kept until the backward pass: of as many as fit, from the top,
which is a *section*; for the next one the text goes through the model up to there again. With what else is
alive, a GPU needs at most 2 GB for this beside the model. A model whose layers cannot be run one after the other
by themselves (they share keys, or streams) is run whole, with the moments of all of them on the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.console import progress
from qat.convert import routed
from qat.convert.flow import Flow, flows, micro_batches
from qat.convert.observer import Mean, Observer
from qat.convert.routed import Routed, complete
from qat.convert.vocabulary import Watch
from qat.errors import ConfigError, NumericsError
from qat.forward import body, decoder_layers, run_body
from qat.head import OutputHead, output_weight
from qat.machine import exact_matmul
from qat.quant.architectures import Layer
from qat.quant.embedding import rows_of, with_rows
from qat.quant.linear import baked
from qat.quant.vocabulary import ROLES

# Numbers in the hidden states that pass through a layer at a time, by device
STATES = {"cuda": 1 << 22, "cpu": 1 << 20}
LOGITS = {"cuda": 1 << 26, "cpu": 1 << 22}  # numbers in the logits that exist at one time, by device
KEPT_BYTES = 7e8  # memory for the kept inputs of decoder layers, in bytes
SHORTEST_SECTION = 4  # fewest decoder layers in a section on a GPU; a text too long for that is split


@dataclass(frozen=True)
class Moments:
    """fp32 matrices in host memory.

    Attributes:
        inputs: H [I, I] by the name of each layer's `source`.
        outputs: G [O, O] by the name of each layer; empty when gradients were not asked for.
        rows: for embedding and head, whose rows all share H: the weight of each row [V], by name.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def gather(model: PreTrainedModel, layers: list[Layer], text: list[Batch], gradients: bool = False) -> Moments:
    """The moments of the given layers of a model, quantized or not, over some text, rows of one length.

    Raises:
        NumericsError: an input or a gradient is NaN or infinite.
    """
    max_states = STATES.get(model.device.type, STATES["cpu"])
    batches = micro_batches(text, max_states // _width(model))
    what, found = "layer curvature" if gradients else "layer inputs", _Means()
    inner, watch = [layer for layer in layers if layer.role not in ROLES], Watch(model, layers)
    draw = torch.Generator().manual_seed(0)
    with (
        torch.no_grad(),
        exact_matmul(),
        baked(model, model.dtype),
        progress(what, _tokens(batches), "tokens") as advance,
    ):
        layerwise = flows(model, batches)
        count = len(decoder_layers(model)) if layerwise else 1
        passing = PASSING[layerwise, gradients]
        for part in _parts(batches, _room(model, gradients)):
            observers = passing(model, inner, part, draw, watch)
            arriving: Callable[[], list[Mean]] = list
            for observer in observers:
                means = observer.means()
                found.add(arriving())  # moments of the previous layer, added while the device computes this layer's
                arriving = means
                advance(_tokens(part) / count)
            found.add(arriving())
        moments = found.of(inner, routed.stacks(model, inner), _tokens(batches))
        for name, (matrix, row) in watch.moments().items():
            _refuse_not_finite(f"the curvature of {name}", matrix.trace() + row.sum())
            moments.inputs[name], moments.rows[name] = matrix, row
    return moments


def _room(model: PreTrainedModel, gradients: bool) -> int:
    """Tokens that are processed together.

    On a GPU, moments wait in host memory: adding to them there costs more than further forward passes.
    """
    token_bytes, kept = _width(model) * model.dtype.itemsize, 1
    if gradients:
        kept = SHORTEST_SECTION if model.device.type == "cuda" else len(decoder_layers(model))
    return int(KEPT_BYTES / (token_bytes * kept))


def _width(model: PreTrainedModel) -> int:
    """Numbers in the hidden state of one token."""
    weight = output_weight(model)
    return int(model.config.get_text_config().hidden_size if weight is None else weight.shape[1])


def _parts(batches: list[Batch], tokens: int) -> Iterator[list[Batch]]:
    together: list[Batch] = []
    for batch in batches:
        if together and _tokens([*together, batch]) > tokens:
            yield together
            together = []
        together.append(batch)
    yield together


def _tokens(batches: list[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


def _forward(
    model: PreTrainedModel, layers: list[Layer], text: list[Batch], draw: torch.Generator, watch: Watch
) -> Iterator[Observer]:
    """Moments of the inputs, decoder layer by decoder layer from the lowest."""
    flow = Flow(model, text)
    for depth, decoder in enumerate(flow.layers):
        observer = Observer(decoder, model, layers)
        with observer.watching(gradients=False):
            flow.advance(depth)
        yield observer
    for n, states in enumerate(flow.states):
        _watch(watch, model, text[n], flow.last(n, states) if watch.head else states)


def _backward(
    model: PreTrainedModel, layers: list[Layer], text: list[Batch], draw: torch.Generator, watch: Watch
) -> Iterator[Observer]:
    """Moments of inputs and gradients, decoder layer by decoder layer from the highest."""
    decoders = decoder_layers(model)
    slopes: list[Tensor] = []
    size = max(1, int(KEPT_BYTES / (_tokens(text) * _width(model) * model.dtype.itemsize)))
    for end in range(len(decoders), 0, -size):
        section = range(max(0, end - size), end)
        flow = Flow(model, text)
        kept = _inputs(flow, section)
        if not slopes:
            flow.advance(end - 1)
            slopes = _slopes(flow, draw, watch)
        flow.states = []
        for depth in reversed(section):
            observer = Observer(decoders[depth], model, layers)
            with observer.watching(gradients=True):
                for n, states in enumerate(kept.pop()):
                    slopes[n] = _back(flow, depth, n, states, slopes[n])
            yield observer
    if watch.embed:
        _to_rows(flow, text, slopes, watch)


def _inputs(flow: Flow, section: range) -> list[list[Tensor]]:
    """The states before each decoder layer of a section, lowest first."""
    for depth in range(section.start):
        flow.advance(depth)
    kept = [flow.states]
    for depth in section[:-1]:
        flow.advance(depth)
        kept.append(flow.states)
    return kept


def _back(flow: Flow, depth: int, n: int, states: Tensor, slope: Tensor) -> Tensor:
    """The loss's gradient at the input of a decoder layer, from the gradient at its output."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        return torch.autograd.grad(flow.through(depth, states, n), states, slope)[0]


def _to_rows(flow: Flow, text: list[Batch], slopes: list[Tensor], watch: Watch) -> None:
    """Passes gradients from the input of the lowest decoder layer back to the embedding's rows, by micro-batch."""
    for n, (batch, slope) in enumerate(zip(text, slopes, strict=True)):
        rows = rows_of(flow.model, batch.input_ids.to(slope.device)).requires_grad_()
        with torch.enable_grad(), with_rows(flow.model, rows):
            entered = flow.entering(n)
        watch.text(flow.model, batch)
        watch.slopes(torch.autograd.grad(entered, rows, slope)[0], rows)


def _watch(watch: Watch, model: PreTrainedModel, batch: Batch, hidden: Tensor) -> None:
    """Gives `watch` a text and, if needed, its final hidden states [B, L, D] with the model's probabilities there."""
    watch.text(model, batch)
    if not watch.head:
        return
    head = OutputHead(model)
    for states in hidden.flatten(0, 1).split(_at_once(head)):
        watch.states(states, head.logits(states).softmax(-1))


def _slopes(flow: Flow, draw: torch.Generator, watch: Watch) -> list[Tensor]:
    """The gradient of the surprise at the output of the last decoder layer, by micro-batch."""
    slopes: list[Tensor] = []
    head = OutputHead(flow.model)
    for n, states in enumerate(flow.states):
        # The random numbers do not depend on the size of micro-batches
        uniform = torch.rand(states.shape[:2], generator=draw, dtype=torch.float32)
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            hidden = flow.last(n, states)
        slope = _surprise(head, hidden.detach(), uniform.to(states.device), watch)
        slopes += torch.autograd.grad(hidden, states, slope)
    return slopes


def _forward_whole(
    model: PreTrainedModel, layers: list[Layer], text: list[Batch], draw: torch.Generator, watch: Watch
) -> Iterator[Observer]:
    """Moments of the inputs of all layers, the model run whole."""
    observer = Observer(body(model), model, layers)
    with observer.watching(gradients=False):
        for batch in text:
            hidden = run_body(model, batch.to(model.device).inputs())
            _watch(watch, model, batch, hidden)
    yield observer


def _backward_whole(
    model: PreTrainedModel, layers: list[Layer], text: list[Batch], draw: torch.Generator, watch: Watch
) -> Iterator[Observer]:
    """Moments of inputs and gradients of all layers, the model run whole."""
    observer, head = Observer(body(model), model, layers), OutputHead(model)
    with observer.watching(gradients=True):
        for batch in text:
            uniform = torch.rand(batch.input_ids.shape, generator=draw, dtype=torch.float32)
            rows, learning = None, _learning_embeddings(model)
            if watch.embed:
                rows = rows_of(model, batch.input_ids.to(model.device)).requires_grad_()
                learning = with_rows(model, rows)
            with torch.enable_grad(), learning:
                hidden = run_body(model, batch.to(model.device).inputs())
            if not hidden.requires_grad:
                raise ConfigError(f"no gradients reach the layers of {type(model).__name__}: use convert=fast")
            hidden.backward(_surprise(head, hidden.detach(), uniform.to(hidden.device), watch))
            watch.text(model, batch)
            if rows is not None and rows.grad is not None:
                watch.slopes(rows.grad, rows)
    yield observer


@contextmanager
def _learning_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, gradients reach every layer although no weight is trained."""
    embeddings: Any = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, states: states.detach().requires_grad_().clone())
    try:
        yield
    finally:
        hook.remove()


PASSING = {
    (True, False): _forward,
    (True, True): _backward,
    (False, False): _forward_whole,
    (False, True): _backward_whole,
}


def _at_once(head: OutputHead) -> int:
    """Positions whose logits fit into `LOGITS` numbers."""
    return max(1, LOGITS.get(head.model.device.type, LOGITS["cpu"]) // head.vocabulary)


def _surprise(head: OutputHead, hidden: Tensor, uniform: Tensor, watch: Watch) -> Tensor:
    """Gradient with respect to the hidden states of −log p(token), each token drawn from p by a uniform number."""
    slopes = []
    positions = _at_once(head)
    for states, u in zip(hidden.flatten(0, 1).split(positions), uniform.flatten().split(positions), strict=True):
        logits, back = head.differentiable(states)
        p = (logits - logits.amax(-1, keepdim=True)).exp_()  # not normalized: the probabilities times their sum
        below = p.cumsum(-1)
        whole = below[:, -1:].clone()
        token = torch.searchsorted(below, u[:, None] * whole).clamp_max_(p.shape[1] - 1)
        del below, logits
        watch.states(states, p.div_(whole))
        p.scatter_add_(1, token, -torch.ones_like(whole))
        slopes.append(back(p))
    return torch.cat(slopes).view_as(hidden)


class _Means:
    """Means over all parts of a text."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, bool], Tensor] = {}
        self._weights: dict[tuple[str, bool], float] = {}
        self._tokens: dict[tuple[str, bool], int] = {}

    def add(self, means: list[Mean]) -> None:
        """Adds the means of a further part of the text."""
        for mean in means:
            key = mean.name, mean.output
            weight = self._weights[key] = self._weights.get(key, 0.0) + mean.weight
            self._tokens[key] = self._tokens.get(key, 0) + mean.tokens
            if key not in self._moments:
                self._moments[key] = mean.moment
            elif weight > 0:
                self._moments[key].lerp_(mean.moment, mean.weight / weight)

    def of(self, layers: list[Layer], stacks: list[Routed], tokens: int) -> Moments:
        """The moments of these layers, in their order, for a text of `tokens` tokens."""
        complete(stacks, self._moments, self._weights, self._tokens, tokens)
        found = Moments()
        for layer in layers:
            if (layer.source, False) not in self._moments:
                raise ConfigError(f"{layer.name} takes no part in what the model says of text: leave it out of quant")
            found.inputs[layer.source] = self._moments[layer.source, False]
        for layer in layers:
            if (layer.name, True) in self._moments:
                found.outputs[layer.name] = self._moments[layer.name, True]
        for name, moment in [*found.inputs.items(), *found.outputs.items()]:
            what = "gradient at the output" if moment is found.outputs.get(name) else "input"
            # Every input or gradient is part of the diagonal, so NaN and infinity show there
            _refuse_not_finite(f"the {what} of {name}", moment.diagonal())
        return found


def _refuse_not_finite(what: str, numbers: Tensor) -> None:
    if not torch.isfinite(numbers).all():
        raise NumericsError(f"{what} holds NaN or infinity: try instance.precision=fp32")
