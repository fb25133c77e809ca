"""Triton kernels of the decoding loop: attention for one token a row, and the choice of the next.

Both read as little as there is to read: keys and values up to a row's own position and no further, logits
once and then one block of them. Shapes: R rows, H query heads, K key-value heads, T positions, D dimensions,
V tokens, N blocks of them.
"""

# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is missing from builds of torch without CUDA
    AVAILABLE = False
else:
    AVAILABLE = True

POSITIONS = 64  # keys that a program loads at a time
TOKENS = 2048  # tokens in a block of the vocabulary


def next_token(
    q_RH1D: Tensor,
    k_RK1D: Tensor,
    v_RK1D: Tensor,
    keys_RKTD: Tensor,
    values_RKTD: Tensor,
    position_R: Tensor,
    scale: float,
) -> Tensor:
    """See `qat.generation.memory.next_token`; one program for a row and a key-value head."""
    rows, heads, _, width = q_RH1D.shape
    out = torch.empty(rows, 1, heads, width, dtype=q_RH1D.dtype, device=q_RH1D.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_RH1D, k_RK1D, v_RK1D))
    shared = k.shape[1]
    _next_token[(rows, shared)](
        *(q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2]),
        *(keys_RKTD, *keys_RKTD.stride()[:2], values_RKTD, *values_RKTD.stride()[:2]),
        *(position_R, out, scale, width, heads // shared),
        *(max(16, triton.next_power_of_2(size)) for size in (width, heads // shared)),
        POSITIONS,
        num_warps=2,
    )
    return out


def choose(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> Tensor:
    """See `qat.generation.sampling.choose`."""
    rows, vocabulary = logits_RV.shape
    blocks = triton.cdiv(vocabulary, TOKENS)
    top, mass = (torch.empty(rows, blocks, dtype=torch.float32, device=logits_RV.device) for _ in range(2))
    chosen = torch.empty(rows, dtype=torch.long, device=logits_RV.device)
    _weigh[(rows, blocks)](logits_RV, top, mass, 1 / temperature, vocabulary, blocks, TOKENS)
    _choose[(rows,)](
        *(logits_RV, top, mass, uniform_R, chosen, 1 / temperature, vocabulary, blocks),
        *(triton.next_power_of_2(blocks), TOKENS),
    )
    return chosen


if AVAILABLE:

    @triton.jit
    def _next_token(
        q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, keys, keys_row, keys_head,
        values, values_row, values_head, position, out, scale, D,
        SHARE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = tl.load(position + row)
        d, g = tl.arange(0, WIDTH), tl.arange(0, QUERIES)
        inside = (g[:, None] < SHARE) & (d[None, :] < D)
        query = tl.load(q + row * q_row + (head * SHARE + g[:, None]) * q_head + d[None, :], mask=inside, other=0.0)
        new_k = tl.load(k + row * k_row + head * k_head + d, mask=d < D, other=0.0)
        new_v = tl.load(v + row * v_row + head * v_head + d, mask=d < D, other=0.0)
        keys += row * keys_row + head * keys_head
        values += row * values_row + head * values_head
        tl.store(keys + at * D + d, new_k, mask=d < D)
        tl.store(values + at * D + d, new_v, mask=d < D)
        # The token's own key first, then blocks of earlier keys, with running maxima (online softmax).
        top = tl.sum(query.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
        mass = tl.full([QUERIES], 1.0, tl.float32)
        mean = tl.zeros([QUERIES, WIDTH], tl.float32) + new_v.to(tl.float32)[None, :]
        for first in range(0, at, BLOCK):
            t = first + tl.arange(0, BLOCK)
            there = (t[:, None] < at) & (d[None, :] < D)
            old_k = tl.load(keys + t[:, None] * D + d[None, :], mask=there, other=0.0)
            old_v = tl.load(values + t[:, None] * D + d[None, :], mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(old_k), input_precision="ieee") * scale
            scores = tl.where(t[None, :] < at, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp(scores - higher[:, None])
            fading = tl.exp(top - higher)
            mean = mean * fading[:, None] + tl.dot(p.to(old_v.dtype), old_v, input_precision="ieee")
            mass = mass * fading + tl.sum(p, 1)
            top = higher
        heads = tl.num_programs(1) * SHARE
        result = (mean / mass[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row * heads + head * SHARE + g[:, None]) * D + d[None, :], result, mask=inside)

    @triton.jit
    def _weigh(logits, top, mass, inverse, V, N, BLOCK: tl.constexpr):
        """The largest logit of a block, and the mass of the block beside it."""
        row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + t, mask=t < V, other=float("-inf"))
        highest = tl.max(x, 0)
        beside = tl.where(highest > float("-inf"), highest, 0.0)  # -inf minus -inf would be NaN
        tl.store(top + row * N + block, highest)
        tl.store(mass + row * N + block, tl.sum(tl.exp((x - beside) * inverse), 0))

    @triton.jit
    def _choose(
        logits, top, mass, uniform, chosen, inverse, V, N, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """A row's block, then the token inside it."""
        row = tl.program_id(0).to(tl.int64)
        u = tl.load(uniform + row)
        b, t = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
        tops = tl.load(top + row * N + b, mask=b < N, other=float("-inf"))
        highest = tl.max(tops, 0)
        weights = tl.load(mass + row * N + b, mask=b < N, other=0.0) * tl.exp((tops - highest) * inverse)
        sums = tl.cumsum(weights, 0)
        target = tl.maximum(u, 0.0) * tl.max(sums, 0)
        block = _first_above(sums, weights, b, target)
        before = tl.max(tl.where(b < block, sums, 0.0), 0)
        block = tl.where(u < 0, tl.min(tl.where(tops == highest, b, BLOCKS - 1), 0), block)
        x = tl.load(logits + row * V + block * BLOCK + t, mask=block * BLOCK + t < V, other=float("-inf"))
        inner = tl.exp((x - highest) * inverse)
        token = _first_above(tl.cumsum(inner, 0), inner, t, target - before)
        token = tl.where(u < 0, tl.min(tl.where(x == highest, t, BLOCK - 1), 0), token)
        tl.store(chosen + row, tl.minimum(block * BLOCK + token, V - 1).to(tl.int64))

    @triton.jit
    def _first_above(sums, weights, places, target):
        """The first place where a sum exceeds the target; where rounding leaves none, the last that adds to it."""
        last = tl.max(tl.where(weights > 0, places, 0), 0)
        return tl.minimum(tl.sum((sums <= target).to(tl.int32), 0), last)
