"""Attention over short rows in plain torch, for GPUs whose programs cannot hold a row's scores; as `kernels`.

Shapes: B rows, H query heads, K key-value heads, L tokens, D dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def forward(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float) -> Tensor:
    """Outputs [B, L, H, D], contiguous; see `qat.attention.short`."""
    k, v = _shared(k_BKLD, q_BHLD), _shared(v_BKLD, q_BHLD)
    out = scaled_dot_product_attention(q_BHLD, k, v, mask_B1LL, is_causal=mask_B1LL is None, scale=scale)
    return out.transpose(1, 2).contiguous()


def backward(
    grad_BLHD: Tensor, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as these are; all products are fp32, as scores of 16 bits would not do."""
    like = (q_BHLD, k_BKLD, v_BKLD)
    grad, q, k, v = (_wide(x) for x in (grad_BLHD.transpose(1, 2), *like))
    k, v = _shared(k, q), _shared(v, q)
    p = _scores(q * scale, k, mask_B1LL).softmax(-1)
    d_p = grad @ v.mT
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
    found = d_scores @ k, _summed(d_scores.mT @ q, k_BKLD), _summed(p.mT @ grad, v_BKLD)
    return tuple(torch.empty_like(x).copy_(d_x) for d_x, x in zip(found, like, strict=True))  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Products of queries and keys, -inf where a token is not seen."""
    scores = q @ k.mT
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return scores.masked_fill(~seen, float("-inf"))


def _shared(x_BKLD: Tensor, q_BHLD: Tensor) -> Tensor:
    """Key-value heads for each query head that shares them."""
    return x_BKLD.repeat_interleave(q_BHLD.shape[1] // x_BKLD.shape[1], 1)


def _summed(x_BHLD: Tensor, like_BKLD: Tensor) -> Tensor:
    """Over the query heads that share a key-value head."""
    return x_BHLD.unflatten(1, (like_BKLD.shape[1], -1)).sum(2)
