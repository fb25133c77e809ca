"""Runs a text through a model layer by layer: a decoder layer processes all of it before the next one begins.

So a layer's own figures (moments of what flows through it) are complete before the next layer's need memory.
It holds for models in which hidden states alone pass from layer to layer, which `flows` finds out.

Shapes: B rows, L positions, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.forward import decoder_layers, run_body, trying

PROBE = 12  # tokens of a row: enough to check that the layers run one after another
# Largest difference allowed between hidden states, relative to their norm
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Flow:
    """Hidden states of a text in micro-batches, between two decoder layers; at first before the lowest one.

    Attributes:
        layers: the decoder layers.
        states: [B, L, D] of each micro-batch, in the model's type, on its device.
    """

    def __init__(self, model: PreTrainedModel, text: list[Batch]) -> None:
        self.model, self._text, self.layers = model, text, decoder_layers(model)
        self.states: list[Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []  # arguments of each decoder layer, by micro-batch
        for batch in text:
            entered: list[tuple[Tensor, dict[str, Any]]] = []

            def enter(states_BLD: Tensor, to: Any = entered, **arguments: Any) -> Tensor:
                to.append((states_BLD, arguments))
                return states_BLD

            self._run(batch, enter)
            self.states.append(entered[0][0])
            self._arguments.append([arguments for _, arguments in entered])

    def through(self, depth: int, states_BLD: Tensor, n: int) -> Tensor:
        """The output of decoder layer `depth` for states [B, L, D] of micro-batch n."""
        states: Tensor = self.layers[depth](states_BLD, **self._arguments[n][depth])
        return states

    def advance(self, depth: int) -> None:
        """Passes all states through decoder layer `depth`."""
        self.states = [self.through(depth, states, n) for n, states in enumerate(self.states)]

    def last(self, n: int, states_BLD: Tensor) -> Tensor:
        """The final norm's output for states [B, L, D] of micro-batch n."""
        return self._run(self._text[n], lambda *_, **__: states_BLD)

    def entering(self, n: int) -> Tensor:
        """States [B, L, D] of micro-batch n before the lowest decoder layer, computed anew."""
        entered: list[Tensor] = []

        def enter(states_BLD: Tensor, **_: Any) -> Tensor:
            entered.append(states_BLD)
            return states_BLD

        self._run(self._text[n], enter)
        return entered[0]

    def _run(self, batch: Batch, instead: Callable[..., Tensor]) -> Tensor:
        with _in_place_of(self.layers, instead):
            return run_body(self.model, batch.to(self.model.device).inputs())


def flows(model: PreTrainedModel, text: list[Batch]) -> bool:
    """Whether running layer after layer gives the same as the model, tested on the beginning of one row."""
    probe = _beginning(text[0])
    wanted = run_body(model, probe.to(model.device).inputs())
    with trying():
        flow = Flow(model, [probe])
        for depth in range(len(flow.layers)):
            flow.advance(depth)
        given = flow.last(0, flow.states[0])
        return bool((given - wanted).norm() <= ROUNDING.get(model.dtype, 1e-4) * wanted.norm())
    return False


def _beginning(batch: Batch) -> Batch:
    return Batch({name: batch.stored[name][:1, :PROBE] for name in _INPUTS if name in batch.stored}, 0, batch.joined)


@contextmanager
def _in_place_of(layers: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    for layer in layers:
        vars(layer)["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def micro_batches(text: list[Batch], tokens: int) -> list[Batch]:
    """The rows of a text, all of one length, in micro-batches of at most `tokens` tokens (at least one row each)."""
    whole = Batch(
        {name: torch.cat([batch.stored[name] for batch in text]) for name in _INPUTS if name in text[0].stored},
        text[0].vocab_size,
        text[0].joined,
    )
    return whole.split(max(1, tokens // whole.input_ids.shape[1]))


_INPUTS = ("input_ids", "document_starts")
