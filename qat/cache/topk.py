"""What a cache keeps of a teacher's logits."""

import torch
from torch import Tensor

BLOCK = 64


def outputs(logits_XV: Tensor, sample_XR: Tensor, top_k: int) -> dict[str, Tensor]:
    """Top-k and sampled log-probabilities of the full softmax, on the device of the logits.

    Args:
        logits_XV: of X positions, in any type; give few positions, there will be an fp32 copy.
        sample_XR: token ids drawn from the whole vocabulary.
        top_k: tokens kept.

    Returns:
        `ids` [X, K] int64, `topk_logprobs` [X, K] and `random_logprobs` [X, R] float16.
    """
    logprobs = logits_XV.float().log_softmax(-1)
    top, ids = most_likely(logprobs, top_k)
    return {"ids": ids, "topk_logprobs": top.half(), "random_logprobs": logprobs.gather(-1, sample_XR).half()}


def most_likely(values_XV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same as `values_XV.topk(top_k)`, with one pass over a large vocabulary.

    The largest K values lie in the K blocks of neighbours with the largest maxima, so only those, and
    what is left over behind the last whole block, need to be ranked.
    """
    blocks = values_XV.shape[1] // BLOCK
    if blocks < 2 * top_k:
        return values_XV.topk(top_k)
    whole = values_XV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best = whole.amax(-1).topk(top_k).indices
    places = best[:, :, None] * BLOCK + torch.arange(BLOCK, device=best.device)
    behind = torch.arange(blocks * BLOCK, values_XV.shape[1], device=best.device).expand(len(best), -1)
    candidates = torch.cat([places.flatten(1), behind], dim=1)
    top, chosen = values_XV.gather(1, candidates).topk(top_k)
    return top, candidates.gather(1, chosen)
