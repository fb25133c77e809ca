"""Triton kernels behind `qat.attention`: attention over short rows, each row's scores held at once.

Flash attention walks over blocks of keys, keeps running maxima and, backwards, adds into dQ from many
programs (Dao 2023, FlashAttention-2, §3). A row of at most `LONGEST` tokens needs none of that: one
program takes a row and a key-value head, makes its scores (all of them at once forward, those of a few
queries at a time backward), and writes every gradient once, in a fixed order. Products are of the
inputs' type, sums and the softmax fp32. Nothing but the inputs is kept for the backward pass.

Shapes: B rows, H query heads, K key-value heads (query head h looks at h // (H / K)), L tokens, D dimensions.
"""

# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is missing from builds of torch without CUDA
    AVAILABLE = False
else:
    AVAILABLE = True

LONGEST, WIDEST = 128, 128  # maximum tokens of a row and dimensions of a head that a program can hold
OLDEST = (8, 0)  # compute capability of Ampere; older GPUs have too little shared memory for long rows
QUERIES = 32  # queries that the backward pass takes at a time
BACKWARD = {"num_warps": 8, "num_stages": 1}
LARGE, LARGE_BYTES = 64 * 128, 128 * 1024  # numbers per row and head; backward on more needs LARGE_BYTES


@cache
def capable(device: torch.device) -> bool:
    """Whether a device can run kernels that hold a row's scores."""
    return AVAILABLE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have at most: 227 KB on an H100, 163 on an A100, 99 on smaller ones since Ampere."""
    if device.type != "cuda":  # Triton's interpreter
        return LARGE_BYTES
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def goes_back(q_BHLD: Tensor) -> bool:
    """Whether `backward` fits into a program of the queries' device."""
    if not capable(q_BHLD.device):
        return False
    length, width = (_padded(size) for size in q_BHLD.shape[2:])
    return length * width <= LARGE or shared_memory(q_BHLD.device) >= LARGE_BYTES


def forward(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float) -> Tensor:
    """Outputs [B, L, H, D], contiguous; see `qat.attention.short`."""
    rows, heads, length, width = q_BHLD.shape
    out = torch.empty(rows, length, heads, width, dtype=q_BHLD.dtype, device=q_BHLD.device)
    inputs = _with_strides(q_BHLD, k_BKLD, v_BKLD, out.transpose(1, 2))
    _forward[(rows, k_BKLD.shape[1])](*inputs, _bytes(mask_B1LL, q_BHLD), scale, *_sizes(q_BHLD, k_BKLD, mask_B1LL))
    return out


def backward(
    grad_BLHD: Tensor, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as these are."""
    grads = torch.empty_like(q_BHLD), torch.empty_like(k_BKLD), torch.empty_like(v_BKLD)
    inputs = _with_strides(q_BHLD, k_BKLD, v_BKLD, grad_BLHD.transpose(1, 2), *grads)
    sizes = _sizes(q_BHLD, k_BKLD, mask_B1LL)
    _backward[(q_BHLD.shape[0], k_BKLD.shape[1])](
        *inputs, _bytes(mask_B1LL, q_BHLD), scale, *sizes, min(QUERIES, sizes[3]), **BACKWARD
    )
    return grads


def _with_strides(*tensors: Tensor) -> list[Tensor | int]:
    """Each tensor [B, H, L, D] followed by its first three strides; the last is 1."""
    flat: list[Tensor | int] = []
    for tensor in tensors:
        flat += [tensor, *tensor.stride()[:3]]
    return flat


def _bytes(mask_B1LL: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if mask_B1LL is None else mask_B1LL.contiguous().view(torch.uint8)


def _sizes(q_BHLD: Tensor, k_BKLD: Tensor, mask_B1LL: Tensor | None) -> tuple[int | bool, ...]:
    """L, D, query heads a key-value head, both sizes as matrix units take them, and whether there is a mask."""
    _, heads, length, width = q_BHLD.shape
    return (length, width, heads // k_BKLD.shape[1], _padded(length), _padded(width), mask_B1LL is not None)


def _padded(size: int) -> int:
    """The size padded for matrix units: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


if AVAILABLE:

    @triton.jit
    def _probabilities(products, mask, row, q, k, scale, L: tl.constexpr, MASKED: tl.constexpr):
        """The softmax of the scores `products · scale` of queries at q with keys at k; fp32."""
        inside = (k[None, :] < L) & (q[:, None] < L)
        seen = inside & (k[None, :] <= q[:, None])
        if MASKED:
            seen = tl.load(mask + (row * L + q[:, None]) * L + k[None, :], mask=inside, other=0) != 0
        # Padding rows attend to themselves; otherwise their softmax would be 0 / 0.
        seen = seen | (k[None, :] == q[:, None])
        scores = tl.where(seen, products * scale, float("-inf"))
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        return p / tl.sum(p, 1)[:, None]

    @triton.jit
    def _tile(pointer, row_stride, head_stride, token_stride, row, head, t, d):
        return pointer + row * row_stride + head * head_stride + t[:, None] * token_stride + d[None, :]

    @triton.jit
    def _forward(
        q,
        q_row,
        q_head,
        q_token,
        k,
        k_row,
        k_head,
        k_token,
        v,
        v_row,
        v_head,
        v_token,
        out,
        out_row,
        out_head,
        out_token,
        mask,
        scale,
        L: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        TOKENS: tl.constexpr,
        WIDTH: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t, d = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
        inside = (t[:, None] < L) & (d[None, :] < D)
        keys = tl.load(_tile(k, k_row, k_head, k_token, row, shared, t, d), mask=inside, other=0.0)
        values = tl.load(_tile(v, v_row, v_head, v_token, row, shared, t, d), mask=inside, other=0.0)
        for one in range(GROUP):
            head = shared * GROUP + one
            queries = tl.load(_tile(q, q_row, q_head, q_token, row, head, t, d), mask=inside, other=0.0)
            p = _probabilities(tl.dot(queries, tl.trans(keys)), mask, row, t, t, scale, L, MASKED)
            mixed = tl.dot(p.to(values.dtype), values)
            tl.store(
                _tile(out, out_row, out_head, out_token, row, head, t, d), mixed.to(out.dtype.element_ty), mask=inside
            )

    @triton.jit
    def _backward(
        q,
        q_row,
        q_head,
        q_token,
        k,
        k_row,
        k_head,
        k_token,
        v,
        v_row,
        v_head,
        v_token,
        grad,
        grad_row,
        grad_head,
        grad_token,
        dq,
        dq_row,
        dq_head,
        dq_token,
        dk,
        dk_row,
        dk_head,
        dk_token,
        dv,
        dv_row,
        dv_head,
        dv_token,
        mask,
        scale,
        L: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        TOKENS: tl.constexpr,
        WIDTH: tl.constexpr,
        MASKED: tl.constexpr,
        QUERIES: tl.constexpr,
    ):
        row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t, d = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
        inside = (t[:, None] < L) & (d[None, :] < D)
        keys = tl.load(_tile(k, k_row, k_head, k_token, row, shared, t, d), mask=inside, other=0.0)
        values = tl.load(_tile(v, v_row, v_head, v_token, row, shared, t, d), mask=inside, other=0.0)
        PARTS: tl.constexpr = TOKENS // QUERIES
        sum_k = tl.zeros([TOKENS, WIDTH], tl.float32)
        sum_v = tl.zeros([TOKENS, WIDTH], tl.float32)
        for step in range(GROUP * PARTS):
            head = shared * GROUP + step // PARTS
            o = step % PARTS * QUERIES + tl.arange(0, QUERIES)
            there = (o[:, None] < L) & (d[None, :] < D)
            queries = tl.load(_tile(q, q_row, q_head, q_token, row, head, o, d), mask=there, other=0.0)
            g = tl.load(_tile(grad, grad_row, grad_head, grad_token, row, head, o, d), mask=there, other=0.0)
            p = _probabilities(tl.dot(queries, tl.trans(keys)), mask, row, o, t, scale, L, MASKED)
            sum_v = tl.dot(tl.trans(p.to(g.dtype)), g, sum_v)
            d_p = tl.dot(g, tl.trans(values))
            d_scores = (p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale).to(queries.dtype)
            d_q = tl.dot(d_scores, keys)
            tl.store(_tile(dq, dq_row, dq_head, dq_token, row, head, o, d), d_q.to(dq.dtype.element_ty), mask=there)
            sum_k = tl.dot(tl.trans(d_scores), queries, sum_k)
        tl.store(_tile(dk, dk_row, dk_head, dk_token, row, shared, t, d), sum_k.to(dk.dtype.element_ty), mask=inside)
        tl.store(_tile(dv, dv_row, dv_head, dv_token, row, shared, t, d), sum_v.to(dv.dtype.element_ty), mask=inside)
