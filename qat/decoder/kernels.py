"""Triton kernels between the matrix products of a decoder layer, each one pass over its tensors.

Sums and roots are fp32; nothing but inputs is kept for the backward pass.

Shapes: T tokens, D hidden, F of the gated layer.
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

TILE = 4096  # maximum numbers of a tensor that a program holds at a time


def norm(x_TD: Tensor, more_TD: Tensor | None, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x + more`, rounded, and its root mean square norm times `weight` (Zhang & Sennrich 2019)."""
    total, out = x_TD if more_TD is None else torch.empty_like(x_TD), torch.empty_like(x_TD)
    tokens, width = x_TD.shape
    tile = _tile(width)
    added = x_TD if more_TD is None else more_TD
    grid = (triton.cdiv(tokens, tile["ROWS"]),)
    _norm[grid](x_TD, added, weight_D, total, out, tokens, width, epsilon, ADD=more_TD is not None, **tile)
    return total, out


def norm_backward(
    total_TD: Tensor, weight_D: Tensor, d_total_TD: Tensor | None, d_out_TD: Tensor, epsilon: float
) -> Tensor:
    """The gradient of either addend of `norm`."""
    d_x = torch.empty_like(total_TD)
    tokens, width = total_TD.shape
    tile = _tile(width)
    further = d_out_TD if d_total_TD is None else d_total_TD
    grid = (triton.cdiv(tokens, tile["ROWS"]),)
    _norm_backward[grid](
        total_TD, weight_D, further, d_out_TD, d_x, tokens, width, epsilon, FURTHER=d_total_TD is not None, **tile
    )
    return d_x


def gate(both_TF: Tensor) -> Tensor:
    """`silu(gate) · up` [T, F] of `[gate, up]` [T, 2 F]."""
    tokens, width = both_TF.shape[0], both_TF.shape[1] // 2
    out = both_TF.new_empty(tokens, width)
    _gate[_tiles(tokens, width)](both_TF, out, width, WIDTH=TILE // 4)
    return out


def gate_backward(both_TF: Tensor, d_out_TF: Tensor) -> Tensor:
    """The gradient [T, 2 F] of the input of `gate`."""
    d_both = torch.empty_like(both_TF)
    tokens, width = d_out_TF.shape
    _gate_backward[_tiles(tokens, width)](both_TF, d_out_TF, d_both, width, WIDTH=TILE // 4)
    return d_both


def _tile(width: int) -> dict[str, int]:
    """Rows of so many numbers that a program takes, and their length as a power of two."""
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // padded), "WIDTH": padded}


def _tiles(tokens: int, width: int) -> tuple[int, int]:
    return tokens, triton.cdiv(width, TILE // 4)


if AVAILABLE:

    @triton.jit
    def _norm(
        x,
        more,
        weight,
        total,
        out,
        tokens,
        width,
        epsilon,
        ADD: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        inside = (t[:, None] < tokens) & (d[None, :] < width)
        place = t[:, None] * width + d[None, :]
        h = tl.load(x + place, mask=inside, other=0.0)
        if ADD:
            h = (h.to(tl.float32) + tl.load(more + place, mask=inside, other=0.0).to(tl.float32)).to(h.dtype)
            tl.store(total + place, h, mask=inside)
        h = h.to(tl.float32)
        root = tl.rsqrt(tl.sum(h * h, 1) / width + epsilon)
        w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(out + place, (h * root[:, None] * w[None, :]).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward(
        total,
        weight,
        d_total,
        d_out,
        d_x,
        tokens,
        width,
        epsilon,
        FURTHER: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        inside = (t[:, None] < tokens) & (d[None, :] < width)
        place = t[:, None] * width + d[None, :]
        h = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        root = tl.rsqrt(tl.sum(h * h, 1) / width + epsilon)
        along = tl.sum(g * h, 1) * root * root / width
        value = (g - h * along[:, None]) * root[:, None]
        if FURTHER:
            value += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + place, value.to(d_x.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate(both, out, width, WIDTH: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        g = tl.load(both + t * 2 * width + f, mask=f < width, other=0.0).to(tl.float32)
        u = tl.load(both + (t * 2 + 1) * width + f, mask=f < width, other=0.0).to(tl.float32)
        tl.store(out + t * width + f, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=f < width)

    @triton.jit
    def _gate_backward(both, d_out, d_both, width, WIDTH: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        g = tl.load(both + t * 2 * width + f, mask=f < width, other=0.0).to(tl.float32)
        u = tl.load(both + (t * 2 + 1) * width + f, mask=f < width, other=0.0).to(tl.float32)
        d = tl.load(d_out + t * width + f, mask=f < width, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        d_g = d * u * s * (1 + g * (1 - s))
        tl.store(d_both + t * 2 * width + f, d_g.to(d_both.dtype.element_ty), mask=f < width)
        tl.store(d_both + (t * 2 + 1) * width + f, (d * g * s).to(d_both.dtype.element_ty), mask=f < width)
