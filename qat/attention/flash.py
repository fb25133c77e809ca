"""Triton kernels behind `qat.attention`: attention over long rows, block by block (Dao 2023, FlashAttention-2, §3).

What a query sees is given as a span, the first token that it sees, up to itself: documents that share a row,
sliding windows and chunks are all of that form. Blocks of keys that no query of a block sees are never read, so a
row of many documents costs what these would cost alone, and nothing of the size L² is ever in memory.

Backward, one kernel makes dQ and another dK and dV, each number by one program and in a fixed order: no sum depends
on which program is faster. Products are of the inputs' type, sums and the softmax fp32.

Shapes: B rows, H query heads, K key-value heads (query head h looks at h // (H / K)), L tokens, D dimensions.
Spans are int32 [B, 2, L, 1] (`qat.masks.spans`): the first token that each query sees, and the end of the queries
that see each key. Both never fall along a row.
"""

# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from math import log2

import torch
from torch import Tensor

from qat.attention.kernels import AVAILABLE, _padded, _with_strides, shared_memory

if AVAILABLE:
    import triton
    import triton.language as tl

LOG2_E = log2(2.718281828459045)  # powers of two are faster than those of e

Cut = dict[str, int]  # queries and keys of a block, and how many warps and stages compute it

# By the width of a head. Where queries are summed over keys, QUERIES is a multiple of KEYS, as the diagonal needs it.
# Of these cuts the compiler has registers enough for all numbers on Hopper, but for 24 bytes of the first.
FORWARD: dict[int, Cut] = {
    64: {"QUERIES": 128, "KEYS": 64, "num_warps": 4, "num_stages": 3},
    128: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3},
}
TO_QUERIES: dict[int, Cut] = {
    64: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3},
    128: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 2},
}
TO_KEYS: dict[int, Cut] = {
    64: {"QUERIES": 64, "KEYS": 128, "num_warps": 8, "num_stages": 2},
    128: {"QUERIES": 32, "KEYS": 128, "num_warps": 8, "num_stages": 2},
}
# For GPUs with less shared memory than an A100
SMALL: Cut = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 2}
SMALL_TO_KEYS: Cut = {"QUERIES": 32, "KEYS": 64, "num_warps": 4, "num_stages": 2}
ROOMY = 160 * 1024


def forward(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, spans_B2L1: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, D], contiguous, and log2 of the sums of each softmax [B, H, L], fp32.

    Args:
        q_BHLD: queries; the last dimension of all three is in one piece.
        k_BKLD: keys.
        v_BKLD: values.
        spans_B2L1: what is seen; None for causal attention.
        scale: of the scores, above 0.
    """
    rows, heads, length, width = q_BHLD.shape
    out = torch.empty(rows, length, heads, width, dtype=q_BHLD.dtype, device=q_BHLD.device)
    sums = torch.empty(rows, heads, length, dtype=torch.float32, device=q_BHLD.device)
    cut = _cut(FORWARD, SMALL, q_BHLD)
    tensors = _with_strides(q_BHLD, k_BKLD, v_BKLD, out.transpose(1, 2))
    grid = (triton.cdiv(length, cut["QUERIES"]), heads, rows)
    _forward[grid](*tensors, sums, *_rest(spans_B2L1, q_BHLD, scale), **_constants(q_BHLD, k_BKLD, spans_B2L1), **cut)
    return out, sums


def backward(
    grad_BLHD: Tensor,
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    out_BLHD: Tensor,
    sums_BHL: Tensor,
    spans_B2L1: Tensor | None,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes gradients into tensors like q, k and v; `out` and `sums` are those that `forward` gave."""
    rows, heads, length, _ = q_BHLD.shape
    d_q, d_k, d_v = into
    along = torch.empty_like(sums_BHL)  # each output's product with its gradient
    rest = (sums_BHL, along, *_rest(spans_B2L1, q_BHLD, scale))
    constants = _constants(q_BHLD, k_BKLD, spans_B2L1)
    given = (q_BHLD, k_BKLD, v_BKLD, grad_BLHD.transpose(1, 2))
    cut = _cut(TO_QUERIES, SMALL, q_BHLD)
    grid = (triton.cdiv(length, cut["QUERIES"]), heads, rows)
    _to_queries[grid](*_with_strides(*given, out_BLHD.transpose(1, 2), d_q), *rest, scale, **constants, **cut)
    cut = _cut(TO_KEYS, SMALL_TO_KEYS, q_BHLD)
    grid = (triton.cdiv(length, cut["KEYS"]), k_BKLD.shape[1], rows)
    _to_keys[grid](*_with_strides(*given, d_k, d_v), *rest, scale, **constants, **cut)


def _cut(cuts: dict[int, Cut], small: Cut, q_BHLD: Tensor) -> Cut:
    """Launch settings for a head's width and the device's shared memory."""
    return cuts[max(64, _padded(q_BHLD.shape[-1]))] if shared_memory(q_BHLD.device) >= ROOMY else small


def _rest(spans: Tensor | None, otherwise: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """Spans, the scale of powers of two, and L."""
    return (otherwise if spans is None else spans.contiguous(), scale * LOG2_E, otherwise.shape[2])


def _constants(q_BHLD: Tensor, k_BKLD: Tensor, spans: Tensor | None) -> dict[str, int | bool]:
    """D, query heads a key-value head, D as matrix units take it, and whether there are spans."""
    _, heads, _, width = q_BHLD.shape
    return {"D": width, "GROUP": heads // k_BKLD.shape[1], "WIDTH": _padded(width), "SPANS": spans is not None}


if AVAILABLE:

    @triton.jit
    def _block(
        pointer, start, token_stride, L, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, EDGE: tl.constexpr
    ):
        """The tokens [SIZE, WIDTH] from `start` on; zeros beyond the row, which without `EDGE` has them all."""
        t, d = tl.arange(0, SIZE), tl.arange(0, WIDTH)
        place = pointer + tl.cast(start, tl.int64) * token_stride + t[:, None] * token_stride + d[None, :]
        if EDGE:
            numbers = tl.load(place, mask=(start + t[:, None] < L) & (d[None, :] < D), other=0.0)
        elif D == WIDTH:
            numbers = tl.load(place)
        else:
            numbers = tl.load(place, mask=d[None, :] < D, other=0.0)
        return numbers

    @triton.jit
    def _write(pointer, numbers, start, token_stride, L, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
        t, d = tl.arange(0, SIZE), tl.arange(0, WIDTH)
        place = pointer + tl.cast(start, tl.int64) * token_stride + t[:, None] * token_stride + d[None, :]
        tl.store(place, numbers.to(pointer.dtype.element_ty), mask=(start + t[:, None] < L) & (d[None, :] < D))

    @triton.jit
    def _keys_of(spans, row, start, L, SPANS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
        """Of a block of queries: where its keys begin, and from where on all queries see all keys before the block."""
        begin, common = 0, 0
        if SPANS:
            first = spans + row * 2 * L
            begin = tl.load(first + start) // KEYS * KEYS
            latest = tl.load(first + tl.minimum(start + QUERIES, L) - 1)
            common = tl.maximum(tl.minimum(tl.cdiv(latest, KEYS) * KEYS, start), begin)
        return begin, common

    @triton.jit
    def _part(part: tl.constexpr, one, two, three, four):
        """A third of the way from `one` to `four`: in the second one all queries see all keys."""
        low, high = one, two
        if part == 1:
            low, high = two, three
        if part == 2:
            low, high = three, four
        return low, high

    @triton.jit
    def _sees(q, k, first, SPANS: tl.constexpr):
        """Whether queries at q, from their `first` token on, see keys at k; both have the shape of a block."""
        seen = k <= q
        if SPANS:
            seen = seen & (k >= first)
        return seen

    @triton.jit
    def _gather(
        mixed, top, total, queries, q, first, keys, k_token, values, v_token, start, scale, L,
        D: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    ):  # fmt: skip
        """Takes a block of keys into the running maxima, sums and outputs of a block of queries."""
        key = _block(keys, start, k_token, L, D, WIDTH, KEYS, EDGE)
        scores = tl.dot(queries, tl.trans(key))
        if EDGE:
            k = start + tl.arange(0, KEYS)
            scores = tl.where(_sees(q[:, None], k[None, :], first[:, None], SPANS), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        value = _block(values, start, v_token, L, D, WIDTH, KEYS, EDGE)
        mixed = tl.dot(p.to(value.dtype), value, mixed * shrink[:, None])
        return mixed, higher, total * shrink + tl.sum(p, 1)

    @triton.jit
    def _forward(
        q, q_row, q_head, q_token, k, k_row, k_head, k_token, v, v_row, v_head, v_token,
        out, out_row, out_head, out_token, sums, spans, scale, L,
        D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the last blocks have most to do
        head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        at = start + tl.arange(0, QUERIES)
        queries = _block(q + row * q_row + head * q_head, start, q_token, L, D, WIDTH, QUERIES, True)
        keys, values = k + row * k_row + head // GROUP * k_head, v + row * v_row + head // GROUP * v_head
        begin, common = _keys_of(spans, row, start, L, SPANS, QUERIES, KEYS)
        first = at
        if SPANS:
            first = tl.load(spans + row * 2 * L + at, mask=at < L, other=0)
        # A maximum of -inf would make NaN of blocks of which a query sees nothing; a query that sees nothing at all
        # must give NaN, and does: its sum is 0.
        top = tl.full([QUERIES], -1e30, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        for part in tl.static_range(3):
            lowest, highest = _part(part, begin, common, start, tl.minimum(start + QUERIES, L))
            for n in range(lowest, highest, KEYS):
                mixed, top, total = _gather(
                    mixed, top, total, queries, at, first, keys, k_token, values, v_token, n, scale, L,
                    D, WIDTH, SPANS, KEYS, part != 1,
                )  # fmt: skip
        _write(out + row * out_row + head * out_head, mixed / total[:, None], start, out_token, L, D, WIDTH, QUERIES)
        lines = (row * tl.num_programs(1) + head) * L
        tl.store(sums + lines + at, top + tl.log2(total), mask=at < L)

    @triton.jit
    def _to_query(
        d_q, queries, grads, sum, along, q, first, keys, k_token, values, v_token, start, scale, L,
        D: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    ):  # fmt: skip
        """Adds what a block of keys says to the gradients of a block of queries."""
        key = _block(keys, start, k_token, L, D, WIDTH, KEYS, EDGE)
        value = _block(values, start, v_token, L, D, WIDTH, KEYS, EDGE)
        p = tl.exp2(tl.dot(queries, tl.trans(key)) * scale - sum[:, None])
        if EDGE:
            k = start + tl.arange(0, KEYS)
            p = tl.where(_sees(q[:, None], k[None, :], first[:, None], SPANS), p, 0.0)
        d_scores = p * (tl.dot(grads, tl.trans(value)) - along[:, None])
        return tl.dot(d_scores.to(key.dtype), key, d_q)

    @triton.jit
    def _to_queries(
        q, q_row, q_head, q_token, k, k_row, k_head, k_token, v, v_row, v_head, v_token,
        grad, grad_row, grad_head, grad_token, out, out_row, out_head, out_token, d_q, d_q_row, d_q_head, d_q_token,
        sums, alongs, spans, scale, L, factor,
        D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        at = start + tl.arange(0, QUERIES)
        queries = _block(q + row * q_row + head * q_head, start, q_token, L, D, WIDTH, QUERIES, True)
        grads = _block(grad + row * grad_row + head * grad_head, start, grad_token, L, D, WIDTH, QUERIES, True)
        outs = _block(out + row * out_row + head * out_head, start, out_token, L, D, WIDTH, QUERIES, True)
        along = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
        lines = (row * tl.num_programs(1) + head) * L
        tl.store(alongs + lines + at, along, mask=at < L)
        sum = tl.load(sums + lines + at, mask=at < L, other=0.0)
        keys, values = k + row * k_row + head // GROUP * k_head, v + row * v_row + head // GROUP * v_head
        begin, common = _keys_of(spans, row, start, L, SPANS, QUERIES, KEYS)
        first = at
        if SPANS:
            first = tl.load(spans + row * 2 * L + at, mask=at < L, other=0)
        d = tl.zeros([QUERIES, WIDTH], tl.float32)
        for part in tl.static_range(3):
            lowest, highest = _part(part, begin, common, start, tl.minimum(start + QUERIES, L))
            for n in range(lowest, highest, KEYS):
                d = _to_query(
                    d, queries, grads, sum, along, at, first, keys, k_token, values, v_token, n, scale, L,
                    D, WIDTH, SPANS, KEYS, part != 1,
                )  # fmt: skip
        _write(d_q + row * d_q_row + head * d_q_head, d * factor, start, d_q_token, L, D, WIDTH, QUERIES)

    @triton.jit
    def _to_key(
        d_k, d_v, keys, values, k, q, q_token, grad, grad_token, sums, alongs, firsts, start, scale, L,
        D: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr, QUERIES: tl.constexpr,
    ):  # fmt: skip
        """Adds what a block of queries says to the gradients of a block of keys and values.

        Blocks that see all keys are masked too: a loop of their own would cost registers that are not there.
        """
        at = start + tl.arange(0, QUERIES)
        query = _block(q, start, q_token, L, D, WIDTH, QUERIES, True)
        grads = _block(grad, start, grad_token, L, D, WIDTH, QUERIES, True)
        sum = tl.load(sums + at, mask=at < L, other=0.0)
        along = tl.load(alongs + at, mask=at < L, other=0.0)
        p = tl.exp2(tl.dot(keys, tl.trans(query)) * scale - sum[None, :])  # [KEYS, QUERIES]
        first = at
        if SPANS:
            first = tl.load(firsts + at, mask=at < L, other=0)
        p = tl.where(_sees(at[None, :], k[:, None], first[None, :], SPANS), p, 0.0)
        d_v = tl.dot(p.to(grads.dtype), grads, d_v)
        d_scores = p * (tl.dot(values, tl.trans(grads)) - along[None, :])
        return tl.dot(d_scores.to(query.dtype), query, d_k), d_v

    @triton.jit
    def _to_keys(
        q, q_row, q_head, q_token, k, k_row, k_head, k_token, v, v_row, v_head, v_token,
        grad, grad_row, grad_head, grad_token, d_k, d_k_row, d_k_head, d_k_token, d_v, d_v_row, d_v_head, d_v_token,
        sums, alongs, spans, scale, L, factor,
        D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0) * KEYS
        shared, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        at = start + tl.arange(0, KEYS)
        keys = _block(k + row * k_row + shared * k_head, start, k_token, L, D, WIDTH, KEYS, True)
        values = _block(v + row * v_row + shared * v_head, start, v_token, L, D, WIDTH, KEYS, True)
        end = L
        if SPANS:
            end = tl.load(spans + row * 2 * L + L + tl.minimum(start + KEYS, L) - 1)
        sum_k = tl.zeros([KEYS, WIDTH], tl.float32)
        sum_v = tl.zeros([KEYS, WIDTH], tl.float32)
        for one in range(GROUP):
            head = shared * GROUP + one
            lines = (row * tl.num_programs(1) * GROUP + head) * L
            queries, grads = q + row * q_row + head * q_head, grad + row * grad_row + head * grad_head
            for m in range(start, end, QUERIES):
                sum_k, sum_v = _to_key(
                    sum_k, sum_v, keys, values, at, queries, q_token, grads, grad_token, sums + lines,
                    alongs + lines, spans + row * 2 * L, m, scale, L, D, WIDTH, SPANS, QUERIES,
                )  # fmt: skip
        _write(d_k + row * d_k_row + shared * d_k_head, sum_k * factor, start, d_k_token, L, D, WIDTH, KEYS)
        _write(d_v + row * d_v_row + shared * d_v_head, sum_v, start, d_v_token, L, D, WIDTH, KEYS)
