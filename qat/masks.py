"""Attention masks as transformers makes them, without reading positions back from the device.

transformers knows which masks the layers of a model need (whole, sliding windows, chunks), and tells
documents of one row apart by positions that restart. But it reads positions back from the device in every
forward pass to see whether they do, and while a graph is recorded, when it cannot look, builds masks for
which layers would be compiled anew. Whoever runs whole rows knows the answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

ARGUMENTS = signature(masking_utils._ignore_causal_mask_sdpa)  # their order depends on the transformers release

@contextmanager
def unread(joined: bool) -> Iterator[None]:
    """Inside, masks of whole rows without padding in front are made without reading anything back.

    Args:
        joined: positions restart somewhere.
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa
    masking_utils.find_packed_sequence_indices = documents if joined else lambda *_, **__: None
    masking_utils._ignore_causal_mask_sdpa = _needs_none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa = before


def documents(position_ids: Tensor) -> Tensor:
    """The number [B, L] of each token's document in its row, from 0, where positions [B, L] restart in each."""
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


def of_documents(position_ids: Tensor) -> Tensor:
    """The boolean mask [B, 1, L, L] that is true where a token is seen: what is before it in its own document."""
    number, places = documents(position_ids), torch.arange(position_ids.shape[1], device=position_ids.device)
    return ((number[:, :, None] == number[:, None, :]) & (places[:, None] >= places))[:, None]


def _needs_none(*arguments: Any, **named: Any) -> bool:
    """Whether plain causal attention is enough, since no window or chunk is shorter than the row."""
    given = ARGUMENTS.bind(*arguments, **named).arguments
    local = given.get("local_attention_size")
    return local is None or given["kv_length"] < local
