"""Attention over long rows, from the joint product with query, key and value to the outputs.

A short row's keys are read once, and so they are normed and rotated where they are used. Those of a long row are read
by every block of queries behind them: here one kernel norms and rotates queries and keys once, before
`qat.attention.flash`, and one takes their gradients back. What they became is not kept for the backward pass but made
again, one more pass over memory.

Shapes: as in `qat.decoder.attention`.
"""

# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from qat.attention import flash
from qat.attention.kernels import AVAILABLE
from qat.decoder.attention import Heads, Places, _arguments, _constants

if AVAILABLE:
    import triton
    import triton.language as tl

    from qat.decoder.attention import FIRST, _halves, _head, _set_back

TILE = 2048  # numbers of a head that a program turns at a time


def forward(qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> tuple[Tensor, Tensor]:
    """Outputs [T, H D] of attention, and log2 of the sums of each softmax [B, H, L]."""
    q, k, v = _parts(_turned(qkv_TF, places, norms, heads), qkv_TF, places, heads)
    out, sums = flash.forward(q, k, v, places.mask, heads.scale)
    return out.view(len(qkv_TF), -1), sums


def backward(
    grad_TF: Tensor,
    qkv_TF: Tensor,
    out_TF: Tensor,
    sums_BHL: Tensor,
    places: Places,
    norms: tuple[Tensor, Tensor] | None,
    heads: Heads,
) -> Tensor:
    """The gradient of `qkv_TF` from that of the outputs; `out` and `sums` as `forward` gave them."""
    turned_TF, d_qkv_TF = _turned(qkv_TF, places, norms, heads), torch.empty_like(qkv_TF)
    d_turned_TF = torch.empty_like(turned_TF)
    into = _parts(d_turned_TF, d_qkv_TF, places, heads)
    grad, out = (x.unflatten(0, (-1, places.cos.shape[1])).unflatten(2, (heads.query, -1)) for x in (grad_TF, out_TF))
    parts = _parts(turned_TF, qkv_TF, places, heads)
    flash.backward(grad, *parts, out, sums_BHL, places.mask, heads.scale, into)
    _call(_turn_back, (qkv_TF, d_turned_TF, d_qkv_TF), places, norms, heads)
    return d_qkv_TF


def _turned(qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> Tensor:
    """Queries and keys side by side [T, (H + K) D], normed and rotated."""
    turned = qkv_TF.new_empty(len(qkv_TF), (heads.query + heads.shared) * heads.width)
    _call(_turn, (qkv_TF, turned), places, norms, heads)
    return turned


def _parts(turned_TF: Tensor, qkv_TF: Tensor, places: Places, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of the first, values of the second, [B, H or K, L, D]."""
    both, whole = (
        x.unflatten(0, (-1, places.cos.shape[1])).unflatten(2, (-1, heads.width)).transpose(1, 2)
        for x in (turned_TF, qkv_TF)
    )
    return both[:, : heads.query], both[:, heads.query :], whole[:, -heads.shared :]


def _call(
    kernel: Any, tensors: tuple[Tensor, ...], places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads
) -> None:
    """A kernel over all heads of queries and keys of all tokens."""
    qkv, length = tensors[0], places.cos.shape[1]
    cos, sin, q_norm, k_norm, _, _, epsilon = _arguments(qkv, places, norms, heads)
    sizes = _constants(places, norms, heads)
    names = ("L", "D", "H", "K", "TURNS", "HALF", "NORMS")
    tokens = max(16, TILE // sizes["WIDTH"])
    grid = (triton.cdiv(length, tokens), heads.query + heads.shared, len(qkv) // length)
    constants = {name: sizes[name] for name in names} | {"TOKENS": tokens}
    kernel[grid](*tensors, cos, sin, q_norm, k_norm, epsilon, **constants)


if AVAILABLE:

    @triton.jit
    def _turn(
        qkv,
        turned,
        cos,
        sin,
        q_norm,
        k_norm,
        epsilon,
        L: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        K: tl.constexpr,
        TURNS: tl.constexpr,
        HALF: tl.constexpr,
        NORMS: tl.constexpr,
        TOKENS: tl.constexpr,
    ):
        t, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HALF)
        head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        ROW: tl.constexpr = (H + 2 * K) * D
        TURNED: tl.constexpr = (H + K) * D
        source = qkv + row * L * ROW + head * D
        cos, sin = cos + row * TURNS, sin + row * TURNS
        if head < H:
            one, two = _head(source, q_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
        else:
            one, two = _head(source, k_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
        inside = (t[:, None] < L) & (d[None, :] < D // 2)
        place = turned + row * L * TURNED + head * D + t[:, None] * TURNED + d[None, :]
        tl.store(place, one, mask=inside)
        tl.store(place + D // 2, two, mask=inside)

    @triton.jit
    def _turn_back(
        qkv,
        d_turned,
        d_qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        epsilon,
        L: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        K: tl.constexpr,
        TURNS: tl.constexpr,
        HALF: tl.constexpr,
        NORMS: tl.constexpr,
        TOKENS: tl.constexpr,
    ):
        t, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HALF)
        head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        ROW: tl.constexpr = (H + 2 * K) * D
        TURNED: tl.constexpr = (H + K) * D
        source, target = qkv + row * L * ROW + head * D, d_qkv + row * L * ROW + head * D
        cos, sin = cos + row * TURNS, sin + row * TURNS
        one, two = _halves(d_turned + row * L * TURNED + head * D, t, d, TURNED, L, D, FIRST)
        one, two = one.to(tl.float32), two.to(tl.float32)
        if head < H:
            _set_back(target, source, one, two, q_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
        else:
            _set_back(target, source, one, two, k_norm, cos, sin, t, d, epsilon, ROW, L, D, NORMS)
