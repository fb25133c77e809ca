"""Second moments on calibration text: how much an error in each direction of a weight matters.

`H` is the mean of x xᵀ over a layer's inputs x. With gradients, `G` is the mean of g gᵀ over the loss's
gradients g at its outputs, the loss being the surprise at next tokens drawn from the model itself (the true
Fisher information, Martens & Grosse 2015), and inputs are weighed by the size of the gradient that meets
them (Kim et al. 2025, "GuidedQuant", arXiv 2505.07004, which weighs by its square; the root lets fewer
tokens decide and did better here). Sums are exact products added up in fp32 (`qat/conversion/products.py`).

One decoder layer at a time takes the whole text, and what is found of it is given out before the next one's is
gathered (`walk`): so the moments of one exist at a time, and its weights need be in memory only then. For gradients the
inputs of all decoder layers are kept until the way back, in memory while there is room and else in a file
(`qat.flow.Store`). A model whose layers cannot be run one after the other by themselves (they share keys, or streams)
is run whole, with the moments of all of them at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.console import progress
from qat.conversion import routed
from qat.conversion.observer import Observer
from qat.conversion.routed import Routed, complete
from qat.conversion.vocabulary import Watch
from qat.errors import ConfigError, NumericsError
from qat.finite import finite
from qat.flow import Flow, flows
from qat.forward import body, run_body
from qat.head import OutputHead, output_weight
from qat.machine import exact_matmul
from qat.quant.architectures import Layer
from qat.quant.embedding import rows_of, with_rows
from qat.quant.linear import baked
from qat.quant.vocabulary import ROLES

# Numbers in the hidden states that pass through a layer at a time, by device
STATES = {"cuda": 1 << 22, "cpu": 1 << 20}
LOGITS = {"cuda": 1 << 26, "cpu": 1 << 22}  # numbers in the logits that exist at one time, by device
INPUTS = ("input_ids", "document_starts")  # of what is stored of a batch, what moments need


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

    def add(self, others: "Moments") -> None:
        """Takes over those of further layers."""
        self.inputs.update(others.inputs)
        self.outputs.update(others.outputs)
        self.rows.update(others.rows)


def gather(model: PreTrainedModel, layers: list[Layer], text: list[Batch], gradients: bool = False) -> Moments:
    """The moments of the given layers of a model, quantized or not, over some text, rows of one length.

    Raises:
        NumericsError: an input or a gradient is NaN or infinite.
    """
    found, what = Moments(), "layer curvature" if gradients else "layer inputs"
    with progress(what, sum(layer.weights for layer in layers), "weights") as advance:
        for members, moments in walk(model, layers, text, gradients):
            found.add(moments)
            advance(sum(layer.weights for layer in members))
    return Moments(
        {layer.source: found.inputs[layer.source] for layer in layers},
        {layer.name: found.outputs[layer.name] for layer in layers if layer.name in found.outputs},
        found.rows,
    )


def walk(
    model: PreTrainedModel,
    layers: list[Layer],
    text: list[Batch],
    gradients: bool = False,
    scratch: Path | None = None,
) -> Iterator[tuple[list[Layer], Moments]]:
    """Layers with their moments: those of one decoder layer after the other, embedding and head last.

    With gradients decoder layers come from the highest to the lowest. A model that is run whole gives all at once.

    Args:
        model: quantized or not.
        layers: that are looked at.
        text: rows of one length.
        gradients: whether those at outputs are looked at too.
        scratch: a folder for what is too large for memory (`qat.flow.Flow`).

    Raises:
        NumericsError: an input or a gradient is NaN or infinite.
    """
    max_states = STATES.get(model.device.type, STATES["cpu"])
    batches = micro_batches(text, max_states // _width(model))
    inner, watch = [layer for layer in layers if layer.role not in ROLES], Watch(model, layers)
    met, few, seen = _tokens(batches), 0, set[str]()
    with baked(model, model.dtype):
        with _exactly():
            observers = _Passes(model, inner, batches, watch, scratch).observers(gradients)
        while True:
            with _exactly():  # not while whoever takes the moments works with them
                if (observer := next(observers, None)) is None:
                    break
                members = [layer for layer in inner if layer.name in observer.names]
                moments, lacking = _moments(members, observer, routed.stacks(model, members), met)
            few, seen = few + lacking, seen | observer.names
            if members:
                yield members, moments
            del moments, observer
    if lost := [layer.name for layer in inner if layer.name not in seen]:
        raise ConfigError(f"{lost[0]} takes no part in what the model says of text: leave it out of quant")
    routed.tell(few, routed.stacks(model, inner))
    if outer := [layer for layer in layers if layer.role in ROLES]:
        yield outer, _of_vocabulary(watch)


@contextmanager
def _exactly() -> Iterator[None]:
    with torch.no_grad(), exact_matmul():
        yield


def micro_batches(text: list[Batch], tokens: int) -> list[Batch]:
    """The rows of a text, all of one length, in micro-batches of at most `tokens` tokens (at least one row each)."""
    whole = Batch(
        {name: torch.cat([batch.stored[name] for batch in text]) for name in INPUTS if name in text[0].stored},
        text[0].vocab_size,
        text[0].joined,
    )
    return whole.split(max(1, tokens // whole.input_ids.shape[1]))


def _width(model: PreTrainedModel) -> int:
    """Numbers in the hidden state of one token."""
    weight = output_weight(model)
    return int(model.config.get_text_config().hidden_size if weight is None else weight.shape[1])


def _tokens(batches: list[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


@dataclass(frozen=True)
class _Passes:
    """The ways of a text through a model in which layers are watched.

    Attributes:
        model: quantized or not.
        layers: of the decoder, that are watched.
        text: in micro-batches.
        watch: is given what embedding and head need.
        scratch: a folder for what is too large for memory.
    """

    model: PreTrainedModel
    layers: list[Layer]
    text: list[Batch]
    watch: Watch
    scratch: Path | None

    def observers(self, gradients: bool) -> Iterator[Observer]:
        """Those of one decoder layer after the other, or of all together where the model has to be run whole."""
        if flows(self.model, self.text[0].inputs()):
            return self._backward() if gradients else self._forward()
        return self._backward_whole() if gradients else self._forward_whole()

    def _forward(self) -> Iterator[Observer]:
        """Inputs, from the lowest decoder layer."""
        flow = self._flow()
        for depth, decoder in enumerate(flow.layers):
            observer = Observer(decoder, self.model, self.layers)
            with observer.watching(gradients=False):
                flow.advance(depth)
            yield observer
            del observer
        for n, batch in enumerate(self.text):
            self._tell(batch, flow.last(n) if self.watch.head else flow.states(n))

    def _backward(self) -> Iterator[Observer]:
        """Inputs and gradients, from the highest decoder layer."""
        flow = self._flow()
        for depth in range(len(flow.layers)):
            flow.advance(depth, keep=True)
        for n, slope in enumerate(self._slopes(flow)):
            flow.store.put(n, slope)  # from here on, gradients at what were states
        for depth, decoder in reversed(list(enumerate(flow.layers))):
            observer = Observer(decoder, self.model, self.layers)
            with observer.watching(gradients=True):
                for n in range(len(self.text)):
                    flow.store.put(n, _back(flow, depth, n, flow.before(depth, n), flow.states(n)))
            yield observer
            del observer
        if self.watch.embed:
            self._to_rows(flow)

    def _forward_whole(self) -> Iterator[Observer]:
        """Inputs of all layers."""
        observer = Observer(body(self.model), self.model, self.layers)
        with observer.watching(gradients=False):
            for batch in self.text:
                self._tell(batch, run_body(self.model, batch.to(self.model.device).inputs()))
        yield observer

    def _backward_whole(self) -> Iterator[Observer]:
        """Inputs and gradients of all layers."""
        model, watch = self.model, self.watch
        observer, head = Observer(body(model), model, self.layers), OutputHead(model)
        with observer.watching(gradients=True):
            for batch, uniform in zip(self.text, self._drawn(), strict=True):
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

    def _flow(self) -> Flow:
        return Flow(self.model, [batch.inputs() for batch in self.text], self.scratch)

    def _drawn(self) -> Iterator[Tensor]:
        """Uniform numbers [B, L] for the tokens of each micro-batch: they do not depend on its size."""
        draw = torch.Generator().manual_seed(0)
        for batch in self.text:
            yield torch.rand(batch.input_ids.shape, generator=draw, dtype=torch.float32)

    def _slopes(self, flow: Flow) -> Iterator[Tensor]:
        """The gradient of the surprise at the output of the last decoder layer, by micro-batch."""
        head = OutputHead(self.model)
        for n, uniform in enumerate(self._drawn()):
            with torch.enable_grad():
                states = flow.states(n).detach().requires_grad_()
                hidden = flow.last(n, states)
            slope = _surprise(head, hidden.detach(), uniform.to(states.device), self.watch)
            yield torch.autograd.grad(hidden, states, slope)[0]

    def _to_rows(self, flow: Flow) -> None:
        """Passes gradients from the input of the lowest decoder layer back to the embedding's rows, by micro-batch."""
        for n, batch in enumerate(self.text):
            slope = flow.states(n)
            rows = rows_of(self.model, batch.input_ids.to(slope.device)).requires_grad_()
            with torch.enable_grad(), with_rows(self.model, rows):
                entered = flow.entering(n)
            self.watch.text(self.model, batch)
            self.watch.slopes(torch.autograd.grad(entered, rows, slope)[0], rows)

    def _tell(self, batch: Batch, hidden: Tensor) -> None:
        """Gives `watch` a text and, where needed, its final hidden states [B, L, D] with the probabilities there."""
        self.watch.text(self.model, batch)
        if not self.watch.head:
            return
        head = OutputHead(self.model)
        for states in hidden.flatten(0, 1).split(_at_once(head)):
            self.watch.states(states, head.logits(states).softmax(-1))


def _back(flow: Flow, depth: int, n: int, states: Tensor, slope: Tensor) -> Tensor:
    """The loss's gradient at the input of a decoder layer, from the gradient at its output."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        return torch.autograd.grad(flow.through(depth, states, n), states, slope)[0]


@contextmanager
def _learning_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, gradients reach every layer although no weight is trained."""
    embeddings: Any = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, states: states.detach().requires_grad_().clone())
    try:
        yield
    finally:
        hook.remove()


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


def _moments(layers: list[Layer], observer: Observer, stacks: list[Routed], tokens: int) -> tuple[Moments, int]:
    """The moments of these layers, in their order, from what was seen of a text of `tokens` tokens.

    Returns:
        With them, how many matrices of experts met too few (`routed.complete`).
    """
    means = observer.means()
    seen = {(mean.name, mean.output): mean.moment for mean in means}
    weights = {(mean.name, mean.output): mean.weight for mean in means}
    few = complete(stacks, seen, weights, {(mean.name, mean.output): mean.tokens for mean in means}, tokens)
    found = Moments()
    for layer in layers:
        if (layer.source, False) not in seen:
            raise ConfigError(f"{layer.name} takes no part in what the model says of text: leave it out of quant")
        found.inputs[layer.source] = seen[layer.source, False]
        if (layer.name, True) in seen:
            found.outputs[layer.name] = seen[layer.name, True]
    for name, moment in [*found.inputs.items(), *found.outputs.items()]:
        what = "gradient at the output" if moment is found.outputs.get(name) else "input"
        # Every input or gradient is part of the diagonal, so NaN and infinity show there
        _refuse_not_finite(f"the {what} of {name}", moment.diagonal())
    return found, few


def _of_vocabulary(watch: Watch) -> Moments:
    """The moments of embedding and head."""
    found = Moments()
    for name, (matrix, row) in watch.moments().items():
        _refuse_not_finite(f"the curvature of {name}", matrix.trace() + row.sum())
        found.inputs[name], found.rows[name] = matrix, row
    return found


def _refuse_not_finite(what: str, numbers: Tensor) -> None:
    if not finite(numbers):
        raise NumericsError(f"{what} holds NaN or infinity: try instance.precision=fp32")
