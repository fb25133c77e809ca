"""The student's decoder layers as training runs them: compiled, computed twice to save memory, or as they are."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def prepare(student: nn.Module, compiled: bool, checkpointing: bool) -> None:
    """Sets how each decoder layer runs, whatever was set before; `prepare(student, False, False)` undoes it.

    Args:
        student: a transformers model with `use_cache=False`, without which every layer would be compiled anew.
        compiled: by torch.compile. The layers share their code, so that all are compiled as one.
        checkpointing: only a layer's input is kept for the backward pass, and the rest computed again.
    """
    base: Any = student.base_model
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
