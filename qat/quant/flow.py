"""A text on its way through a model: every decoder layer takes all of it before the next one begins.

So a layer's own figures (moments of what flows through it) are complete before the next layer's need memory.

Shapes: B rows, L positions, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cache.reader import Batch


class Flow:
    """Hidden states of a text in micro-batches, between two decoder layers; first before the lowest one.

    Attributes:
        states: [B, L, D] of each micro-batch, in the model's type, on its device.
    """

    def __init__(self, model: PreTrainedModel, text: list[Batch]) -> None:
        self.model, self._text = model, text
        self.states: list[Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []  # of each decoder layer, by micro-batch
        for batch in text:
            entered: list[tuple[Tensor, dict[str, Any]]] = []

            def enter(states_BLD: Tensor, to: Any = entered, **arguments: Any) -> Tensor:
                to.append((states_BLD, arguments))
                return states_BLD

            self._run(batch, enter)
            self.states.append(entered[0][0])
            self._arguments.append([arguments for _, arguments in entered])

    def through(self, depth: int, states_BLD: Tensor, n: int) -> Tensor:
        """What decoder layer `depth` makes of states [B, L, D] of micro-batch n."""
        layer = decoder_layers(self.model)[depth]
        return layer(states_BLD, **self._arguments[n][depth])

    def advance(self, depth: int) -> None:
        """All states through decoder layer `depth`."""
        self.states = [self.through(depth, states, n) for n, states in enumerate(self.states)]

    def last(self, n: int, states_BLD: Tensor) -> Tensor:
        """What comes behind the decoder layers, the norm, of states [B, L, D] of micro-batch n."""
        return self._run(self._text[n], lambda *_, **__: states_BLD)

    def _run(self, batch: Batch, instead: Callable[..., Tensor]) -> Tensor:
        with _in_place_of_layers(self.model, instead):
            inputs = batch.to(self.model.device).inputs()
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, lowest first."""
    base: Any = model.base_model
    return list(base.layers)


@contextmanager
def _in_place_of_layers(model: PreTrainedModel, forward: Callable[..., Tensor]) -> Iterator[None]:
    layers: list[Any] = decoder_layers(model)
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def micro_batches(text: list[Batch], tokens: int) -> list[Batch]:
    """The rows of a text, all of one length, in micro-batches of at most so many tokens (one row at least)."""
    whole = Batch(
        {name: torch.cat([batch.stored[name] for batch in text]) for name in _INPUTS if name in text[0].stored},
        text[0].vocab_size,
        text[0].joined,
    )
    return whole.split(max(1, tokens // whole.input_ids.shape[1]))


_INPUTS = ("input_ids", "document_starts")
