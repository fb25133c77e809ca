"""What keeps documents that share a row from seeing each other.

transformers can tell documents apart by positions that restart, but only without a key-value cache:
with one, which is the default, it ignores the restarts without a word. A mask [B, 1, L, L] of its own
is passed on as it is, whatever else is set, and costs no look at the data on the GPU. It must be
boolean for `sdpa`; `eager` attention would add it to the scores, so models are loaded with `sdpa`.
"""

import torch
from torch import Tensor


def inputs(input_ids_BL: Tensor, document_starts_BL: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments of a causal model's forward pass.

    Args:
        input_ids_BL: token ids, int64.
        document_starts_BL: true where a document begins; None for one document a row, padded behind.
    """
    if document_starts_BL is None:
        return {"input_ids": input_ids_BL}
    starts = document_starts_BL.bool()
    length = starts.shape[1]
    places = torch.arange(length, device=starts.device)
    positions = places - torch.where(starts, places, 0).cummax(1).values
    document = starts.cumsum(1)
    mask = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places)
    return {"input_ids": input_ids_BL, "position_ids": positions, "attention_mask": mask[:, None]}
