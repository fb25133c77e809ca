"""Triton kernels behind `qat.distill.head`: rows of the head by token, and a softmax's sum and gradient.

Plain torch would write the rows of every cached token to memory, and pass over the logits five times.

Shapes: P positions, D hidden, V vocabulary, K cached tokens.
"""

# Triton gives the arguments of kernels its own meaning.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    AVAILABLE = False
else:
    AVAILABLE = True

WIDE = 4096  # logits a program holds at once
NARROW = 128  # hidden dimensions a program holds at once, for all of its tokens


def dot_rows(weight_VD: Tensor, ids_PK: Tensor, hidden_PD: Tensor) -> Tensor:
    """`weight[ids] · hidden` [P, K] in fp32."""
    positions, tokens = ids_PK.shape
    out = torch.empty(positions, tokens, device=hidden_PD.device)
    constants = {"K": tokens, "TOKENS": triton.next_power_of_2(tokens), "WIDTH": NARROW}
    _dot_rows[(positions,)](
        weight_VD, ids_PK.contiguous(), hidden_PD.contiguous(), out, hidden_PD.shape[1], **constants
    )
    return out


def combine_rows(weight_VD: Tensor, ids_PK: Tensor, factor_PK: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ_k factor_k · weight[id_k]` [P, D], summed in fp32."""
    positions, tokens = ids_PK.shape
    out = torch.empty(positions, weight_VD.shape[1], device=weight_VD.device, dtype=dtype)
    constants = {"K": tokens, "TOKENS": triton.next_power_of_2(tokens), "WIDTH": NARROW}
    _combine_rows[(positions,)](
        weight_VD, ids_PK.contiguous(), factor_PK.contiguous(), out, weight_VD.shape[1], **constants
    )
    return out


def log_sum_exp(logits_PV: Tensor) -> Tensor:
    """Log-sum-exp [P] in fp32, in one pass."""
    out = torch.empty(len(logits_PV), device=logits_PV.device)
    _log_sum_exp[(len(logits_PV),)](logits_PV, out, logits_PV.shape[1], WIDTH=WIDE, num_warps=8)
    return out


def softmax_times(logits_PV: Tensor, log_sum_P: Tensor, factor_P: Tensor, dtype: torch.dtype) -> Tensor:
    """`softmax(logits) · factor` [P, V] in the given type."""
    out = torch.empty_like(logits_PV, dtype=dtype)
    positions, vocabulary = logits_PV.shape
    grid = (triton.cdiv(vocabulary, WIDE), positions)
    _softmax_times[grid](logits_PV, log_sum_P, factor_P.contiguous(), out, vocabulary, WIDTH=WIDE, num_warps=8)
    return out


if AVAILABLE:

    @triton.jit
    def _dot_rows(weight, ids, hidden, out, width, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
        position = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, TOKENS)
        token = tl.load(ids + position * K + k, mask=k < K, other=0)
        total = tl.zeros([TOKENS], tl.float32)
        for start in range(0, width, WIDTH):
            d = start + tl.arange(0, WIDTH)
            inside = (k[:, None] < K) & (d[None, :] < width)
            rows = tl.load(weight + token[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            h = tl.load(hidden + position * width + d, mask=d < width, other=0.0).to(tl.float32)
            total += tl.sum(rows * h[None, :], 1)
        tl.store(out + position * K + k, total, mask=k < K)

    @triton.jit
    def _combine_rows(weight, ids, factor, out, width, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
        position = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, TOKENS)
        token = tl.load(ids + position * K + k, mask=k < K, other=0)
        f = tl.load(factor + position * K + k, mask=k < K, other=0.0)
        for start in range(0, width, WIDTH):
            d = start + tl.arange(0, WIDTH)
            inside = (k[:, None] < K) & (d[None, :] < width)
            rows = tl.load(weight + token[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total = tl.sum(rows * f[:, None], 0)
            tl.store(out + position * width + d, total.to(out.dtype.element_ty), mask=d < width)

    @triton.jit
    def _log_sum_exp(logits, out, vocabulary, WIDTH: tl.constexpr):
        position = tl.program_id(0).to(tl.int64)
        highest = tl.full([WIDTH], float("-inf"), tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        for start in range(0, vocabulary, WIDTH):
            v = start + tl.arange(0, WIDTH)
            x = tl.load(logits + position * vocabulary + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, x)
            seen = higher > float("-inf")  # a lane of padding alone has seen nothing
            total = tl.where(seen, total * tl.exp(highest - higher) + tl.exp(x - higher), 0.0)
            highest = higher
        top = tl.max(highest, 0)
        tl.store(out + position, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))

    @triton.jit
    def _softmax_times(logits, log_sum, factor, out, vocabulary, WIDTH: tl.constexpr):
        position = tl.program_id(1).to(tl.int64)
        v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        place, inside = position * vocabulary + v, v < vocabulary
        x = tl.load(logits + place, mask=inside, other=float("-inf"))
        value = tl.exp(x - tl.load(log_sum + position)) * tl.load(factor + position)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
