"""Triton kernels behind `qat.distill.head`: rows of the head by token, and a softmax's sum and gradient.

Plain torch would write the rows of every cached token to memory, and pass over the logits five times.

Shapes: P positions, D hidden, V vocabulary, K cached tokens.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
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

WIDE = 4096  # logits that a program processes at a time
NARROW = 128  # hidden dimensions that a program processes at a time, for all of its tokens
FEW = 16  # tokens that a program adds at a time, each in `ACROSS` hidden dimensions
ACROSS = 512


def dot_rows(weight_VD: Tensor, ids_PK: Tensor, hidden_PD: Tensor) -> Tensor:
    """`weight[ids] · hidden` [P, K] in fp32."""
    positions, tokens = ids_PK.shape
    out = torch.empty(positions, tokens, dtype=torch.float32, device=hidden_PD.device)
    constants = {"K": tokens, "TOKENS": triton.next_power_of_2(tokens), "WIDTH": NARROW}
    _dot_rows[(positions,)](
        weight_VD, ids_PK.contiguous(), hidden_PD.contiguous(), out, hidden_PD.shape[1], **constants
    )
    return out


def combine_rows(weight_VD: Tensor, ids_PK: Tensor, factor_PK: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ_k factor_k · weight[id_k]` [P, D], summed in fp32."""
    positions, tokens = ids_PK.shape
    out = torch.empty(positions, weight_VD.shape[1], device=weight_VD.device, dtype=dtype)
    width = weight_VD.shape[1]
    constants = {"K": tokens, "FEW": FEW, "WIDTH": ACROSS, "num_warps": 1}
    _combine_rows[(positions, triton.cdiv(width, ACROSS))](
        weight_VD, ids_PK.contiguous(), factor_PK.contiguous(), out, width, **constants
    )
    return out


def log_sum_exp(logits_PV: Tensor) -> Tensor:
    """Log-sum-exp [P] in fp32, in one pass."""
    out = torch.empty(len(logits_PV), dtype=torch.float32, device=logits_PV.device)
    _log_sum_exp[(len(logits_PV),)](logits_PV, out, logits_PV.shape[1], WIDTH=WIDE, num_warps=8)
    return out


def softmax_times(logits_PV: Tensor, log_sum_P: Tensor, factor_P: Tensor, dtype: torch.dtype) -> Tensor:
    """`softmax(logits) · factor` [P, V] in the given type."""
    out = torch.empty_like(logits_PV, dtype=dtype)
    positions, vocabulary = logits_PV.shape
    grid = (triton.cdiv(vocabulary, WIDE), positions)
    _softmax_times[grid](logits_PV, log_sum_P, factor_P.contiguous(), out, vocabulary, WIDTH=WIDE, num_warps=8)
    return out


def divergence(student_PV: Tensor, teacher_PV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher‖student) of softmaxes at a temperature, and the log-sum-exp of either side's logits over it.

    All three are fp32 [P], the KL not yet times the square of the temperature; one pass over both logits.
    """
    positions, vocabulary = student_PV.shape
    device = student_PV.device
    kl, student_sum, teacher_sum = (torch.empty(positions, dtype=torch.float32, device=device) for _ in range(3))
    outputs = (kl, student_sum, teacher_sum)
    _divergence[(positions,)](
        student_PV, teacher_PV, *outputs, vocabulary, 1 / temperature, WIDTH=WIDE // 2, num_warps=8
    )
    return outputs


def divergence_gradient(
    student_PV: Tensor,
    teacher_PV: Tensor,
    student_sum_P: Tensor,
    teacher_sum_P: Tensor,
    temperature: float,
    factor_P: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`(softmax(student / T) - softmax(teacher / T)) · factor` [P, V] in the given type."""
    out = torch.empty_like(student_PV, dtype=dtype)
    positions, vocabulary = student_PV.shape
    grid = (triton.cdiv(vocabulary, WIDE), positions)
    sums = (student_sum_P, teacher_sum_P, factor_P.contiguous())
    _divergence_gradient[grid](student_PV, teacher_PV, *sums, out, vocabulary, 1 / temperature, WIDTH=WIDE, num_warps=8)
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
    def _combine_rows(weight, ids, factor, out, width, K: tl.constexpr, FEW: tl.constexpr, WIDTH: tl.constexpr):
        """One warp per program: each thread adds up its own dimensions and needs no data of others."""
        position = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], tl.float32)
        for start in range(0, K, FEW):
            k = start + tl.arange(0, FEW)
            token = tl.load(ids + position * K + k, mask=k < K, other=0)
            f = tl.load(factor + position * K + k, mask=k < K, other=0.0)
            inside = (k[:, None] < K) & (d[None, :] < width)
            rows = tl.load(weight + token[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(rows * f[:, None], 0)
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
            seen = higher > float("-inf")  # false for lanes that only had padding so far
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

    @triton.jit
    def _divergence(
        student, teacher, kl, student_sum, teacher_sum, vocabulary, inverse_temperature, WIDTH: tl.constexpr
    ):
        position = tl.program_id(0).to(tl.int64)
        high_s = tl.full([WIDTH], float("-inf"), tl.float32)
        high_t = tl.full([WIDTH], float("-inf"), tl.float32)
        total_s = tl.zeros([WIDTH], tl.float32)
        total_t = tl.zeros([WIDTH], tl.float32)
        apart = tl.zeros([WIDTH], tl.float32)
        for start in range(0, vocabulary, WIDTH):
            v = start + tl.arange(0, WIDTH)
            inside = v < vocabulary
            place = position * vocabulary + v
            s = tl.load(student + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            t = tl.load(teacher + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            higher_s = tl.where(inside, tl.maximum(high_s, s), high_s)
            higher_t = tl.where(inside, tl.maximum(high_t, t), high_t)
            # Lanes outside the vocabulary keep their value: their factors are exp(-inf) and exp(0).
            keep_s = tl.where(inside, tl.exp(high_s - higher_s), 1.0)
            keep_t = tl.where(inside, tl.exp(high_t - higher_t), 1.0)
            add_s = tl.where(inside, tl.exp(s - higher_s), 0.0)
            add_t = tl.where(inside, tl.exp(t - higher_t), 0.0)
            total_s = total_s * keep_s + add_s
            total_t = total_t * keep_t + add_t
            apart = apart * keep_t + add_t * (t - s)
            high_s = higher_s
            high_t = higher_t
        top_s = tl.max(high_s, 0)
        top_t = tl.max(high_t, 0)
        share = tl.exp(high_t - top_t)
        sum_t = tl.sum(total_t * share, 0)
        log_s = top_s + tl.log(tl.sum(total_s * tl.exp(high_s - top_s), 0))
        log_t = top_t + tl.log(sum_t)
        tl.store(kl + position, tl.sum(apart * share, 0) / sum_t - log_t + log_s)
        tl.store(student_sum + position, log_s)
        tl.store(teacher_sum + position, log_t)

    @triton.jit
    def _divergence_gradient(
        student, teacher, student_sum, teacher_sum, factor, out, vocabulary, inverse_temperature, WIDTH: tl.constexpr
    ):
        position = tl.program_id(1).to(tl.int64)
        v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        place, inside = position * vocabulary + v, v < vocabulary
        s = tl.load(student + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        p_s = tl.exp(s - tl.load(student_sum + position))
        p_t = tl.exp(t - tl.load(teacher_sum + position))
        value = (p_s - p_t) * tl.load(factor + position)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
