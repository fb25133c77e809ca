"""What a cache keeps of a teacher's logits."""

import torch
from torch import Tensor

from qat.cache import kernels
from qat.cache.kernels import BLOCK


def outputs(logits_XV: Tensor, sample_XR: Tensor, top_k: int) -> dict[str, Tensor]:
    """Top-k and sampled log-probabilities of the full softmax, on the device of the logits.

    Args:
        logits_XV: of X positions, in any type; give few positions, there will be fp32 copies of them.
        sample_XR: token ids drawn from the whole vocabulary.
        top_k: tokens kept.

    Returns:
        `ids` [X, K] int64, `topk_logprobs` [X, K] and `random_logprobs` [X, R] float16.
    """
    if logits_XV.is_cuda and kernels.AVAILABLE:
        log_sum, maxima = kernels.summary(logits_XV)
        top, ids = most_likely(logits_XV, top_k, maxima)
        sampled = logits_XV.gather(-1, sample_XR)
        top, sampled = (values.float() - log_sum[:, None] for values in (top, sampled))
    else:
        logprobs = logits_XV.float().log_softmax(-1)
        top, ids = most_likely(logprobs, top_k)
        sampled = logprobs.gather(-1, sample_XR)
    return {"ids": ids, "topk_logprobs": top.half(), "random_logprobs": sampled.half()}


def most_likely(values_XV: Tensor, top_k: int, maxima_XN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same as `values_XV.topk(top_k)`, with one pass over a large vocabulary.

    The largest K values lie in the K blocks of neighbours with the largest maxima, so only those need to
    be ranked; and, if the maxima are not given, what is left over behind the last whole block.
    """
    vocabulary = values_XV.shape[1]
    if vocabulary // BLOCK < 2 * top_k:
        return values_XV.topk(top_k)
    if maxima_XN is not None:
        return _ranked(values_XV, _members(maxima_XN.topk(top_k).indices), top_k)
    whole = vocabulary // BLOCK * BLOCK
    best = values_XV[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1).topk(top_k).indices
    behind = torch.arange(whole, vocabulary, device=best.device).expand(len(best), -1)
    return _ranked(values_XV, torch.cat([_members(best), behind], 1), top_k)


def _members(blocks_XK: Tensor) -> Tensor:
    """The ids [X, K·BLOCK] in some blocks."""
    return (blocks_XK[:, :, None] * BLOCK + torch.arange(BLOCK, device=blocks_XK.device)).flatten(1)


def _ranked(values_XV: Tensor, candidates_XC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest of some candidates; ids beyond the vocabulary, in its last block, are left out."""
    last = values_XV.shape[1] - 1
    values = values_XV.gather(1, candidates_XC.clamp_max(last))
    values = values.masked_fill_(candidates_XC > last, -torch.inf)
    top, chosen = values.topk(top_k)
    return top, candidates_XC.gather(1, chosen)
