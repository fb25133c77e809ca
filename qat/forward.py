"""A forward pass over whole rows: compiled, computed twice to save memory, or as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [P, D] of every position that predicts a token.

    Args:
        model: a causal language model of transformers.
        inputs: `input_ids` [B, L], and further arguments of its base model where rows are not plain text.
    """
    base: Any = model.base_model
    if len(inputs) > 1:
        return _predicting(base(**inputs).last_hidden_state)
    with _plain_positions():
        return _predicting(base(**inputs).last_hidden_state)


def _predicting(states_BLD: Tensor) -> Tensor:
    return states_BLD[:, :-1].flatten(0, 1)


@contextmanager
def _plain_positions() -> Iterator[None]:
    """Keeps transformers from making masks where positions simply count and attention is simply causal.

    It would read positions back from the GPU in every forward pass to look for packed sequences, and while
    a graph is recorded, when it cannot look, build a mask for which layers would be compiled anew.
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    masking_utils._ignore_causal_mask_sdpa = lambda *_, **__: True
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa = before


def prepare(model: nn.Module, compiled: bool, checkpointing: bool = False) -> None:
    """Sets how each decoder layer runs, whatever was set before; `prepare(model, False)` undoes it.

    Args:
        model: of transformers, with `use_cache=False`, without which every layer would be compiled anew.
        compiled: by torch.compile. The layers share their code, so that all are compiled as one.
        checkpointing: only a layer's input is kept for the backward pass, and the rest computed again.
    """
    base: Any = model.base_model
    for layer in base.layers:
        vars(layer).pop("forward", None)
        forward = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=False)
        if checkpointing:
            # Nothing here is random, and a generator's state cannot be read while a graph is recorded.
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if compiled or checkpointing:
            layer.forward = forward
