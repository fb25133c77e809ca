"""Triton kernels for attention over short rows, from the joint product with query, key and value to the outputs.

What transformers does between that product and the scores happens in registers: norms of each head
(Qwen3), rotary positions (Su et al. 2021), both again in the backward pass. A head is held as two halves,
because a rotation turns number i of the first with number i of the second. Otherwise as `qat.attention`.

Shapes: B rows, L tokens, T = B · L, H query heads, K key-value heads, D dimensions of a head.
"""

# Triton gives the arguments of kernels its own meaning.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.attention.kernels import AVAILABLE, _bytes

if AVAILABLE:
    import triton
    import triton.language as tl

    from qat.attention.kernels import _probabilities

FORWARD = {"num_warps": 4}
BACKWARD = {"num_warps": 8}


@dataclass(frozen=True)
class Heads:
    """What does not change from layer to layer: H, K, D, the factor on scores and the epsilon of norms."""

    query: int
    shared: int
    width: int
    scale: float
    epsilon: float

    @property
    def row(self) -> int:
        """Numbers of a token in the joint product."""
        return (self.query + 2 * self.shared) * self.width


@dataclass(frozen=True)
class Places:
    """Where tokens stand: what rotates a head at each position, and which tokens see each other.

    Attributes:
        cos, sin: [B or 1, L, D], the second half of D like the first.
        mask: boolean [B, 1, L, L], true where a token is seen; None for causal attention.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


def forward(qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> Tensor:
    """Outputs [T, H D] of attention.

    Args:
        qkv_TF: H heads of queries, K of keys and K of values side by side, [T, (H + 2 K) D].
        places: of the tokens.
        norms: weights [D] of the norms of queries and keys; None without norms.
        heads: the layer's.
    """
    out = qkv_TF.new_empty(len(qkv_TF), heads.query * heads.width)
    grid = (len(qkv_TF) // places.cos.shape[1], heads.shared)
    _forward[grid](
        qkv_TF, out, *_arguments(qkv_TF, places, norms, heads), **_constants(places, norms, heads), **FORWARD
    )
    return out


def backward(
    grad_TF: Tensor, qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads
) -> Tensor:
    """The gradient of `qkv_TF` from that of the outputs."""
    d_qkv = torch.empty_like(qkv_TF)
    grid = (len(qkv_TF) // places.cos.shape[1], heads.shared)
    arguments = _arguments(qkv_TF, places, norms, heads)
    _backward[grid](qkv_TF, grad_TF, d_qkv, *arguments, **_constants(places, norms, heads), **BACKWARD)
    return d_qkv


def _arguments(
    qkv: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads
) -> tuple[Tensor | float, ...]:
    weights = (qkv, qkv) if norms is None else norms
    return places.cos, places.sin, *weights, _bytes(places.mask, qkv), heads.scale, heads.epsilon


def _constants(places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> dict[str, int | bool]:
    rows, length, width = places.cos.shape
    return {
        "L": length,
        "D": width,
        "H": heads.query,
        "K": heads.shared,
        "TURNS": length * width if rows > 1 else 0,
        "TOKENS": max(16, triton.next_power_of_2(length)),
        "HALF": max(16, triton.next_power_of_2(width // 2)),
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "NORMS": norms is not None,
        "MASKED": places.mask is not None,
    }


if AVAILABLE:

    @triton.jit
    def _halves(pointer, t, d, row: tl.constexpr, L: tl.constexpr, D: tl.constexpr):
        """The two halves of a head's numbers [TOKENS, HALF], from a pointer to the first token's."""
        inside = (t[:, None] < L) & (d[None, :] < D // 2)
        place = pointer + t[:, None] * row + d[None, :]
        return tl.load(place, mask=inside, other=0.0), tl.load(place + D // 2, mask=inside, other=0.0)

    @triton.jit
    def _set_halves(pointer, one, two, t, d, row: tl.constexpr, L: tl.constexpr, D: tl.constexpr):
        inside = (t[:, None] < L) & (d[None, :] < D // 2)
        place = pointer + t[:, None] * row + d[None, :]
        tl.store(place, one.to(pointer.dtype.element_ty), mask=inside)
        tl.store(place + D // 2, two.to(pointer.dtype.element_ty), mask=inside)

    @triton.jit
    def _weights(weight, d, D: tl.constexpr, NORMS: tl.constexpr):
        """The two halves of a norm's weight [1, HALF]; ones without norms."""
        if NORMS:
            one = tl.load(weight + d, mask=d < D // 2, other=0.0).to(tl.float32)
            two = tl.load(weight + D // 2 + d, mask=d < D // 2, other=0.0).to(tl.float32)
        else:
            one = d * 0.0 + 1.0
            two = one
        return one[None, :], two[None, :]

    @triton.jit
    def _root(one, two, epsilon, D: tl.constexpr):
        return tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / D + epsilon)[:, None]

    @triton.jit
    def _turned(one, two, w_one, w_two, cos, sin, epsilon, D: tl.constexpr, NORMS: tl.constexpr):
        """A head normed and rotated, in the type it came in."""
        a, b = one.to(tl.float32), two.to(tl.float32)
        if NORMS:
            root = _root(a, b, epsilon, D)
            a, b = a * root * w_one, b * root * w_two
        return (a * cos - b * sin).to(one.dtype), (b * cos + a * sin).to(one.dtype)

    @triton.jit
    def _turned_back(d_one, d_two, one, two, w_one, w_two, cos, sin, epsilon, D: tl.constexpr, NORMS: tl.constexpr):
        """The gradient of a head from that of `_turned`."""
        g, h = d_one * cos + d_two * sin, d_two * cos - d_one * sin
        if NORMS:
            a, b = one.to(tl.float32), two.to(tl.float32)
            root = _root(a, b, epsilon, D)
            g, h = g * w_one, h * w_two
            along = (tl.sum(g * a, 1) + tl.sum(h * b, 1))[:, None] * root * root / D
            g, h = (g - a * along) * root, (h - b * along) * root
        return g, h

    @triton.jit
    def _forward(
        qkv,
        out,
        cos,
        sin,
        q_norm,
        k_norm,
        mask,
        scale,
        epsilon,
        L: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        K: tl.constexpr,
        TURNS: tl.constexpr,
        TOKENS: tl.constexpr,
        HALF: tl.constexpr,
        WIDTH: tl.constexpr,
        NORMS: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t, d, whole = tl.arange(0, TOKENS), tl.arange(0, HALF), tl.arange(0, WIDTH)
        ROW: tl.constexpr = (H + 2 * K) * D
        inputs, outputs = qkv + row * L * ROW, out + row * L * H * D
        turns = (t[:, None] < L) & (d[None, :] < D // 2)
        c = tl.load(cos + row * TURNS + t[:, None] * D + d[None, :], mask=turns, other=0.0)
        s = tl.load(sin + row * TURNS + t[:, None] * D + d[None, :], mask=turns, other=0.0)
        q_one, q_two = _weights(q_norm, d, D, NORMS)
        k_one, k_two = _weights(k_norm, d, D, NORMS)
        key, further = _halves(inputs + (H + shared) * D, t, d, ROW, L, D)
        key, further = _turned(key, further, k_one, k_two, c, s, epsilon, D, NORMS)
        inside = (t[:, None] < L) & (whole[None, :] < D)
        values = tl.load(inputs + (H + K + shared) * D + t[:, None] * ROW + whole[None, :], mask=inside, other=0.0)
        for one in range(H // K):
            head = shared * (H // K) + one
            query, more = _halves(inputs + head * D, t, d, ROW, L, D)
            query, more = _turned(query, more, q_one, q_two, c, s, epsilon, D, NORMS)
            scores = tl.dot(more, tl.trans(further), tl.dot(query, tl.trans(key)))
            p = _probabilities(scores, mask, row, t, scale, L, MASKED)
            mixed = tl.dot(p.to(values.dtype), values)
            place = outputs + head * D + t[:, None] * H * D + whole[None, :]
            tl.store(place, mixed.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(
        qkv,
        grad,
        d_qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        mask,
        scale,
        epsilon,
        L: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        K: tl.constexpr,
        TURNS: tl.constexpr,
        TOKENS: tl.constexpr,
        HALF: tl.constexpr,
        WIDTH: tl.constexpr,
        NORMS: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t, d, whole = tl.arange(0, TOKENS), tl.arange(0, HALF), tl.arange(0, WIDTH)
        ROW: tl.constexpr = (H + 2 * K) * D
        inputs, d_inputs, grads = qkv + row * L * ROW, d_qkv + row * L * ROW, grad + row * L * H * D
        turns = (t[:, None] < L) & (d[None, :] < D // 2)
        c = tl.load(cos + row * TURNS + t[:, None] * D + d[None, :], mask=turns, other=0.0)
        s = tl.load(sin + row * TURNS + t[:, None] * D + d[None, :], mask=turns, other=0.0)
        q_one, q_two = _weights(q_norm, d, D, NORMS)
        k_one, k_two = _weights(k_norm, d, D, NORMS)
        key, further = _halves(inputs + (H + shared) * D, t, d, ROW, L, D)
        key, further = _turned(key, further, k_one, k_two, c, s, epsilon, D, NORMS)
        inside = (t[:, None] < L) & (whole[None, :] < D)
        value_place = (H + K + shared) * D + t[:, None] * ROW + whole[None, :]
        values = tl.load(inputs + value_place, mask=inside, other=0.0)
        d_key = tl.zeros([TOKENS, HALF], tl.float32)
        d_further = tl.zeros([TOKENS, HALF], tl.float32)
        d_values = tl.zeros([TOKENS, WIDTH], tl.float32)
        for one in range(H // K):
            head = shared * (H // K) + one
            raw_query, raw_more = _halves(inputs + head * D, t, d, ROW, L, D)
            query, more = _turned(raw_query, raw_more, q_one, q_two, c, s, epsilon, D, NORMS)
            g = tl.load(grads + head * D + t[:, None] * H * D + whole[None, :], mask=inside, other=0.0)
            scores = tl.dot(more, tl.trans(further), tl.dot(query, tl.trans(key)))
            p = _probabilities(scores, mask, row, t, scale, L, MASKED)
            d_values = tl.dot(tl.trans(p.to(g.dtype)), g, d_values)
            d_p = tl.dot(g, tl.trans(values))
            d_scores = (p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale).to(query.dtype)
            d_key = tl.dot(tl.trans(d_scores), query, d_key)
            d_further = tl.dot(tl.trans(d_scores), more, d_further)
            d_query, d_more = tl.dot(d_scores, key), tl.dot(d_scores, further)
            d_query, d_more = _turned_back(d_query, d_more, raw_query, raw_more, q_one, q_two, c, s, epsilon, D, NORMS)
            _set_halves(d_inputs + head * D, d_query, d_more, t, d, ROW, L, D)
        key, further = _halves(inputs + (H + shared) * D, t, d, ROW, L, D)  # again: registers are few
        d_key, d_further = _turned_back(d_key, d_further, key, further, k_one, k_two, c, s, epsilon, D, NORMS)
        _set_halves(d_inputs + (H + shared) * D, d_key, d_further, t, d, ROW, L, D)
        tl.store(d_inputs + value_place, d_values.to(d_qkv.dtype.element_ty), mask=inside)
