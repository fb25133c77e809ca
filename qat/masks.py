"""Attention masks as transformers makes them, without reading positions back from the device.

transformers knows which masks the layers of a model need (whole, sliding windows, chunks), and tells
documents of one row apart by positions that restart. But it reads positions back from the device in every
forward pass to see whether they do, and while a graph is recorded, when it cannot look, builds masks for
which layers would be compiled anew. Whoever runs whole rows knows the answer.

Where every query sees the tokens from some first one up to itself, as under all of these masks, that first one
says as much as a line of the mask. *Spans* are these, int32 [B, 2, L, 1] for rows of L tokens: the first token that
each query sees, and the end of the queries that see each key. Both never fall along a row. They have the dimensions
of a mask because that is the place in which models of transformers hand them on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

ARGUMENTS = signature(masking_utils._ignore_causal_mask_sdpa)  # their order depends on the transformers release
_whole = ContextVar("whole", default=False)


@contextmanager
def unread(joined: bool) -> Iterator[None]:
    """Inside, masks of whole rows without padding in front are made without reading anything back.

    Args:
        joined: positions restart somewhere.
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa
    masking_utils.find_packed_sequence_indices = documents if joined else lambda *_, **__: None
    masking_utils._ignore_causal_mask_sdpa = _needs_none
    outside = _whole.set(True)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa = before
        _whole.reset(outside)


def whole() -> bool:
    """Whether masks are being made for whole rows, inside `unread`."""
    return _whole.get()


def documents(position_ids: Tensor) -> Tensor:
    """The number [B, L] of each token's document in its row, from 0, where positions [B, L] restart in each."""
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


def of_documents(position_ids: Tensor) -> Tensor:
    """The boolean mask [B, 1, L, L] that is true where a token is seen: what is before it in its own document."""
    number, places = documents(position_ids), torch.arange(position_ids.shape[1], device=position_ids.device)
    return ((number[:, :, None] == number[:, None, :]) & (places[:, None] >= places))[:, None]


def spans_of_documents(position_ids: Tensor) -> Tensor:
    """The spans [B, 2, L, 1] of which `of_documents` is the mask."""
    number, places = documents(position_ids), torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = number.diff(dim=1, prepend=number[:, :1] - 1) != 0
    return _spans(torch.where(begins, places, 0).cummax(1).values)


def spans_of(mask: Tensor) -> Tensor:
    """The spans [B, 2, L, 1] of a boolean mask [B, 1, L, L].

    Nothing is read back from the device to see whether the mask is one of spans. Of a row in which it is not, no
    token sees anything, not even itself, so that attention over it gives NaN.
    """
    first = mask[:, 0].view(torch.uint8).argmax(-1)  # of equal numbers it is the first
    places = torch.arange(mask.shape[-1], device=mask.device)
    fits = (mask[:, 0] == _seen(first)).flatten(1).all(1) & (first.diff(dim=1) >= 0).all(1) & (first <= places).all(1)
    return _spans(torch.where(fits[:, None], first, len(places)))


def of_spans(spans: Tensor) -> Tensor:
    """The boolean mask [B, 1, L, L] of spans [B, 2, L, 1]."""
    return _seen(spans[:, 0, :, 0])[:, None]


def _seen(first: Tensor) -> Tensor:
    """The mask [B, L, L] of queries that see all from `first` [B, L] up to themselves."""
    places = torch.arange(first.shape[1], device=first.device)
    return (places >= first[:, :, None]) & (places[:, None] >= places)


def _spans(first: Tensor) -> Tensor:
    """The spans of which `first` [B, L] are the first tokens."""
    keys = torch.arange(first.shape[1], device=first.device).expand_as(first).contiguous()
    ends = torch.searchsorted(first, keys, right=True)
    return torch.stack([first, ends], 1).int()[..., None]


def _needs_none(*arguments: Any, **named: Any) -> bool:
    """Whether plain causal attention is enough, since no window or chunk is shorter than the row."""
    given = ARGUMENTS.bind(*arguments, **named).arguments
    local = given.get("local_attention_size")
    return local is None or given["kv_length"] < local
