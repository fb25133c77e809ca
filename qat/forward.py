"""A forward pass over whole rows: fused or compiled, computed twice to save memory, or as it is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from qat.decoder import Decoder, decoder

FUSED = "qat_decoder"  # the attribute of a base model where its fused layers are kept


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [P, D] of every position that predicts a token.

    A row's last token predicts none and nothing before it sees it, so it is left out from the start.

    Args:
        model: a causal language model of transformers.
        inputs: `input_ids` [B, L], and further arguments of its base model where rows are not plain text.
    """
    base: Any = model.base_model
    shortened = {name: _shortened(name, value) for name, value in inputs.items()}
    fused: Decoder | None = vars(base).get(FUSED)
    if fused is not None and fused.takes(**shortened):
        return fused(**shortened)
    with nullcontext() if len(inputs) > 1 else _plain_positions():
        states_BLD: Tensor = base(**shortened).last_hidden_state
    return states_BLD.flatten(0, 1)


def _shortened(name: str, value: Tensor) -> Tensor:
    return value[:, :, :-1, :-1] if name == "attention_mask" else value[:, :-1]


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
        compiled: fused, where the architecture and the device allow it (`qat.decoder`), with the weights that
            layers have now; else by torch.compile. The layers share their code, so that all are compiled as one.
        checkpointing: only a layer's input is kept for the backward pass, and the rest computed again.
    """
    base: Any = model.base_model
    vars(base)[FUSED] = decoder(model, checkpointing) if compiled else None
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
