"""Triton kernels for attention over short rows, from the joint product with query, key and value to the outputs.

`qat.decoder.long` has the same for rows beyond `LONGEST` tokens.

What transformers does between that product and the scores happens in registers: norms of each head
(Qwen3), rotary positions (Su et al. 2021), both again in the backward pass. A head is held as two halves,
because a rotation turns number i of the first with number i of the second. Otherwise as `qat.attention`.

Shapes: B rows, L tokens, T = B · L, H query heads, K key-value heads, D dimensions of a head.
"""

# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.attention.kernels import AVAILABLE, LONGEST, _bytes, shared_memory

if AVAILABLE:
    import triton
    import triton.language as tl

    from qat.attention.kernels import _probabilities

# Launch settings by the size of a row and a head, chosen for speed within the GPU's shared memory. Few queries at a
# time fit into registers, and then nothing is loaded ahead. Only rows of 128 tokens with narrow heads are faster
# with all queries at once, if the shared memory is large enough.
FORWARD = {"num_warps": 4}  # up to 113 KB of shared memory
FORWARD_SMALL = {"num_warps": 4, "num_stages": 1}
FORWARD_LARGE = {"num_warps": 8, "num_stages": 1}  # 96 KB of shared memory for the longest rows and widest heads
BACKWARD_SHORT = {"QUERIES": 32, "num_warps": 4, "num_stages": 1}
BACKWARD_WHOLE = {"QUERIES": LONGEST, "num_warps": 8}  # 193 KB of shared memory for heads of 64 dimensions
BACKWARD_LONG = {"QUERIES": 32, "num_warps": 8, "num_stages": 1}  # 96 KB of shared memory
ROOMY = 193 * 1024


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
    """Positions of tokens: the rotation of a head at each of them, and which tokens see each other.

    Attributes:
        cos, sin: [B or 1, L, D], the second half of D like the first.
        mask: boolean [B, 1, L, L], true where a token is seen, and of long rows spans int32 [B, 2, L, 1]
            (`qat.masks`); None for causal attention.
        long: rows are longer than a program can hold: `qat.decoder.long` computes them.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    long: bool = False


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
    arguments, constants = _arguments(qkv_TF, places, norms, heads), _constants(places, norms, heads)
    _forward[grid](qkv_TF, out, *arguments, **constants, **_forward_cut(constants, qkv_TF.device))
    return out


def backward(
    grad_TF: Tensor, qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads
) -> Tensor:
    """The gradient of `qkv_TF` from that of the outputs."""
    d_qkv = torch.empty_like(qkv_TF)
    grid = (len(qkv_TF) // places.cos.shape[1], heads.shared)
    arguments, constants = _arguments(qkv_TF, places, norms, heads), _constants(places, norms, heads)
    _backward[grid](qkv_TF, grad_TF, d_qkv, *arguments, **constants, **_backward_cut(constants, qkv_TF.device))
    return d_qkv


def _forward_cut(constants: dict[str, int | bool], device: torch.device) -> dict[str, int]:
    """Launch settings of the forward pass."""
    if constants["TOKENS"] * constants["WIDTH"] > LONGEST * 64:
        return FORWARD_LARGE
    return FORWARD if shared_memory(device) >= ROOMY else FORWARD_SMALL


def _backward_cut(constants: dict[str, int | bool], device: torch.device) -> dict[str, int]:
    """Launch settings of the backward pass, with the number of queries at a time."""
    tokens = constants["TOKENS"]
    if tokens <= 64:
        return {**BACKWARD_SHORT, "QUERIES": min(BACKWARD_SHORT["QUERIES"], tokens)}
    whole = constants["WIDTH"] <= 64 and shared_memory(device) >= ROOMY
    return BACKWARD_WHOLE if whole else BACKWARD_LONG


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
    def _inside(t, d, L: tl.constexpr, WIDTH: tl.constexpr):
        return (t[:, None] < L) & (d[None, :] < WIDTH)

    # The compiler merges two loads of the same address and keeps the value in registers between them. Different
    # cache modifiers (`HOW`) prevent that.
    FIRST, AGAIN = tl.constexpr(""), tl.constexpr(".ca")

    @triton.jit
    def _halves(pointer, t, d, row: tl.constexpr, L: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr):
        """The two halves of a head's numbers [T, HALF], from a pointer to the first token's."""
        inside = _inside(t, d, L, D // 2)
        place = pointer + t[:, None] * row + d[None, :]
        one = tl.load(place, mask=inside, other=0.0, cache_modifier=HOW)
        return one, tl.load(place + D // 2, mask=inside, other=0.0, cache_modifier=HOW)

    @triton.jit
    def _turns(cos, sin, t, d, L: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr):
        """Cosines and sines [T, HALF] of the first half, fp32."""
        inside = _inside(t, d, L, D // 2)
        place = t[:, None] * D + d[None, :]
        c = tl.load(cos + place, mask=inside, other=0.0, cache_modifier=HOW)
        return c.to(tl.float32), tl.load(sin + place, mask=inside, other=0.0, cache_modifier=HOW).to(tl.float32)

    @triton.jit
    def _weights(weight, d, D: tl.constexpr):
        """The two halves of a norm's weight [1, HALF]."""
        one = tl.load(weight + d, mask=d < D // 2, other=0.0)
        two = tl.load(weight + D // 2 + d, mask=d < D // 2, other=0.0)
        return one.to(tl.float32)[None, :], two.to(tl.float32)[None, :]

    @triton.jit
    def _root(one, two, epsilon, D: tl.constexpr):
        return tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / D + epsilon)[:, None]

    @triton.jit
    def _head(
        pointer, norm, cos, sin, t, d, epsilon, row: tl.constexpr, L: tl.constexpr, D: tl.constexpr, NORMS: tl.constexpr
    ):
        """A head normed and rotated, in the type it has in memory."""
        one, two = _halves(pointer, t, d, row, L, D, FIRST)
        a, b = one.to(tl.float32), two.to(tl.float32)
        if NORMS:
            w, v = _weights(norm, d, D)
            root = _root(a, b, epsilon, D)
            a, b = a * root * w, b * root * v
        c, s = _turns(cos, sin, t, d, L, D, FIRST)
        return (a * c - b * s).to(one.dtype), (b * c + a * s).to(one.dtype)

    @triton.jit
    def _set_back(
        target,
        source,
        d_one,
        d_two,
        norm,
        cos,
        sin,
        t,
        d,
        epsilon,
        row: tl.constexpr,
        L: tl.constexpr,
        D: tl.constexpr,
        NORMS: tl.constexpr,
    ):
        """Stores the gradient of a head from that of what `_head` gives.

        What `_head` knew is loaded and computed again: registers are few, and memory near.
        """
        c, s = _turns(cos, sin, t, d, L, D, AGAIN)
        g, h = d_one * c + d_two * s, d_two * c - d_one * s
        if NORMS:
            w, v = _weights(norm, d, D)
            one, two = _halves(source, t, d, row, L, D, AGAIN)
            a, b = one.to(tl.float32), two.to(tl.float32)
            root = _root(a, b, epsilon, D)
            g, h = g * w, h * v
            along = (tl.sum(g * a, 1) + tl.sum(h * b, 1))[:, None] * root * root / D
            g, h = (g - a * along) * root, (h - b * along) * root
        inside = _inside(t, d, L, D // 2)
        place = target + t[:, None] * row + d[None, :]
        tl.store(place, g.to(target.dtype.element_ty), mask=inside)
        tl.store(place + D // 2, h.to(target.dtype.element_ty), mask=inside)

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
        cos, sin = cos + row * TURNS, sin + row * TURNS
        key, further = _head(inputs + (H + shared) * D, k_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
        inside = _inside(t, whole, L, D)
        values = tl.load(inputs + (H + K + shared) * D + t[:, None] * ROW + whole[None, :], mask=inside, other=0.0)
        for one in range(H // K):
            head = shared * (H // K) + one
            query, more = _head(inputs + head * D, q_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
            scores = tl.dot(more, tl.trans(further), tl.dot(query, tl.trans(key)))
            p = _probabilities(scores, mask, row, t, t, scale, L, MASKED)
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
        QUERIES: tl.constexpr,
    ):
        row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t, d, whole = tl.arange(0, TOKENS), tl.arange(0, HALF), tl.arange(0, WIDTH)
        ROW: tl.constexpr = (H + 2 * K) * D
        PARTS: tl.constexpr = TOKENS // QUERIES
        inputs, d_inputs, grads = qkv + row * L * ROW, d_qkv + row * L * ROW, grad + row * L * H * D
        cos, sin = cos + row * TURNS, sin + row * TURNS
        key_place = (H + shared) * D
        key, further = _head(inputs + key_place, k_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
        inside = _inside(t, whole, L, D)
        value_place = (H + K + shared) * D + t[:, None] * ROW + whole[None, :]
        values = tl.load(inputs + value_place, mask=inside, other=0.0)
        d_key = tl.zeros([TOKENS, HALF], tl.float32)
        d_further = tl.zeros([TOKENS, HALF], tl.float32)
        d_values = tl.zeros([TOKENS, WIDTH], tl.float32)
        for step in range(H // K * PARTS):
            head = shared * (H // K) + step // PARTS
            q = step % PARTS * QUERIES + tl.arange(0, QUERIES)
            query, more = _head(inputs + head * D, q_norm, cos, sin, q, d, epsilon, ROW, L, D, NORMS)
            given = grads + head * D + q[:, None] * H * D + whole[None, :]
            g = tl.load(given, mask=_inside(q, whole, L, D), other=0.0)
            scores = tl.dot(more, tl.trans(further), tl.dot(query, tl.trans(key)))
            p = _probabilities(scores, mask, row, q, t, scale, L, MASKED)
            d_values = tl.dot(tl.trans(p.to(g.dtype)), g, d_values)
            d_p = tl.dot(g, tl.trans(values))
            d_scores = (p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale).to(query.dtype)
            d_key = tl.dot(tl.trans(d_scores), query, d_key)
            d_further = tl.dot(tl.trans(d_scores), more, d_further)
            d_query, d_more = tl.dot(d_scores, key), tl.dot(d_scores, further)
            place = head * D
            _set_back(
                d_inputs + place, inputs + place, d_query, d_more, q_norm, cos, sin, q, d, epsilon, ROW, L, D, NORMS
            )
        _set_back(
            d_inputs + key_place,
            inputs + key_place,
            d_key,
            d_further,
            k_norm,
            cos,
            sin,
            t,
            d,
            epsilon,
            ROW,
            L,
            D,
            NORMS,
        )
        tl.store(d_inputs + value_place, d_values.to(d_qkv.dtype.element_ty), mask=inside)
