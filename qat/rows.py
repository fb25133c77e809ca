"""Rows of tokens as a model takes them. Documents that share one are kept apart by positions that restart.

transformers makes the masks of them that a model's layers need, whatever these are (`qat.masks`), but only
without a key-value cache; with one it ignores the restarts without a word.
"""

import torch
from torch import Tensor


def inputs(input_ids_BL: Tensor, document_starts_BL: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a model's forward pass over whole rows.

    Args:
        input_ids_BL: token ids, int64.
        document_starts_BL: true where a document begins; None for one document a row, padded behind.
    """
    if document_starts_BL is None:
        return {"input_ids": input_ids_BL}
    starts = document_starts_BL.bool()
    places = torch.arange(starts.shape[1], device=starts.device)
    return {"input_ids": input_ids_BL, "position_ids": places - torch.where(starts, places, 0).cummax(1).values}
