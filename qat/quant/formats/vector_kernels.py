"""Triton kernels of the format `vector`: weights written, and their gradients reduced, in single passes.

One launch serves all layers of a stack. The nearest entry is found by trying all of them, a vector's numbers in one
thread's registers. A codebook's gradient is a sum over all vectors of an entry: a product with their indicators, which
adds up in a fixed order where a scatter would not. Scales are recomputed from A and B instead of being stored.

Shapes: N layers, O outputs, I inputs, K entries of D numbers, R ranks; J = I / D indices of a row.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from qat.quant.formats.base import ALIGNMENT, Parts
from qat.quant.formats.low_rank_kernels import AVAILABLE, columns, constants, tiles

if AVAILABLE:
    import triton
    import triton.language as tl

    from qat.quant.formats.low_rank_kernels import through_values

WRITTEN = 512  # vectors that a program writes
ENTRIES = 256  # at most, whose gradients a program sums up
SUMMED = 64  # vectors that it takes at a time
LONGEST = 8192  # vectors that it sums over


def write(indices: Tensor, operands: Parts, latent: Tensor | None, weights: Tensor, starts: Tensor) -> None:
    """`weight = codebook[indices] ⊙ A @ B`; see `Kernels.write`.

    Args:
        indices: [N, O, J] uint8 or int16.
        latent, weights, starts: as there.
        operands: codebook [N, K, D], in any order; A [N, O, R], magnitudes included; B [N, R, I].
    """
    codebook, A, B = operands["codebook"], operands["A"].contiguous(), operands["B"].contiguous()
    layers, outputs, row = indices.shape
    _write[(triton.cdiv(outputs * row, WRITTEN), layers)](
        *(indices, codebook, A, B, indices if latent is None else latent, weights, starts),
        *(outputs, row, A.shape[2]),
        K=codebook.shape[1],
        D=codebook.shape[2],
        LATENT=latent is not None,
        SIZE=WRITTEN,
    )


def gradients(grads: Tensor, starts: Tensor, indices: Tensor, operands: Parts, found: Parts) -> None:
    """Gradients of codebook, A and B; see `Kernels.gradients`."""
    codebook, A, B = operands["codebook"], operands["A"].contiguous(), operands["B"].contiguous()
    layers, outputs, row = indices.shape
    entries, dim = codebook.shape[1:]
    sizes, compiled = (outputs, row, A.shape[2]), constants(grads, operands)
    _reduce_rows[(tiles(outputs), layers)](grads, starts, indices, codebook, B, found["A"], *sizes, D=dim, **compiled)
    columns(grads, starts, indices, operands, found["B"])

    pieces, some = triton.cdiv(outputs * row, LONGEST), max(16, min(entries, ENTRIES))
    partial = torch.empty(layers, pieces, entries, dim, dtype=torch.float32, device=codebook.device)
    _reduce_codebook[(pieces, triton.cdiv(entries, some), layers)](
        *(grads, starts, indices, A, B, partial, *sizes),
        K=entries,
        D=dim,
        SOME=some,
        SIZE=SUMMED,
        LONGEST=LONGEST,
        PRECISION=compiled["PRECISION"],
        num_warps=8,
    )
    torch.sum(partial, 1, out=found["codebook"])


if AVAILABLE:
    BEGIN = tl.constexpr(ALIGNMENT)
    PADDED = tl.constexpr(16)  # columns of the smallest product

    @triton.jit
    def _scales(A, B, layer, o, i, inside, outputs, inputs, ranks):
        """S [SIZE, D] of some vectors, in rows o and columns i."""
        scale = tl.zeros(i.shape, tl.float32)
        for r in range(ranks):
            a = tl.load(A + (layer * outputs + o) * ranks + r, mask=inside, other=0.0)
            b = tl.load(B + (layer * ranks + r) * inputs + i, mask=inside[:, None], other=0.0)
            scale += a[:, None] * b
        return scale

    @triton.jit
    def _write(
        indices,
        codebook,
        A,
        B,
        latent,
        weights,
        starts,
        outputs,
        row,
        ranks,
        K: tl.constexpr,
        D: tl.constexpr,
        LATENT: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        layer = tl.program_id(1).to(tl.int64)
        m, d = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.arange(0, D)
        inside = m < outputs * row
        here = m.to(tl.int64)[:, None] * D + d[None, :]
        scale = _scales(A, B, layer, m // row, (m % row)[:, None] * D + d[None, :], inside, outputs, row * D, ranks)
        place = layer * outputs * row + m
        entry = codebook + layer * K * D + d
        if LATENT:
            wanted = tl.load(latent + layer * outputs * row * D + here, mask=inside[:, None], other=0.0)
            chosen = tl.zeros([SIZE], tl.int32)
            closest = tl.full([SIZE], float("inf"), tl.float32)
            for k in range(K):
                away = wanted - tl.load(entry + k * D)[None, :] * scale
                far = tl.sum(away * away, 1)
                chosen = tl.where(far < closest, k, chosen)
                closest = tl.minimum(far, closest)
            tl.store(indices + place, chosen.to(indices.dtype.element_ty), mask=inside)
        else:
            chosen = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        value = tl.load(entry[None, :] + chosen[:, None] * D) * scale
        there = tl.multiple_of(tl.load(starts + layer), BEGIN) + here
        tl.store(weights + there, value.to(weights.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _reduce_rows(
        grads,
        starts,
        indices,
        codebook,
        B,
        d_A,
        outputs,
        row,
        ranks,
        D: tl.constexpr,
        K: tl.constexpr,
        RANKS: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Some rows of A's gradient."""
        layer = tl.program_id(1).to(tl.int64)
        begin = tl.multiple_of(tl.load(starts + layer), BEGIN)
        o, r = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, RANKS)
        sum_A = tl.zeros([TILE, RANKS], tl.float32)
        for start in range(0, row * D, TILE):
            i = start + tl.arange(0, TILE)
            d_scale = through_values(grads, begin, indices, codebook, layer, o, i, outputs, row, K, D)
            known = (r[None, :] < ranks) & (i[:, None] < row * D)
            b = tl.load(B + (layer * ranks + r[None, :]) * (row * D) + i[:, None], mask=known, other=0.0)
            sum_A = tl.dot(d_scale, b, sum_A, input_precision=PRECISION)
        kept = (o[:, None] < outputs) & (r[None, :] < ranks)
        tl.store(d_A + (layer * outputs + o[:, None]) * ranks + r[None, :], sum_A, mask=kept)

    @triton.jit
    def _reduce_codebook(
        grads,
        starts,
        indices,
        A,
        B,
        partial,
        outputs,
        row,
        ranks,
        K: tl.constexpr,
        D: tl.constexpr,
        SOME: tl.constexpr,
        SIZE: tl.constexpr,
        LONGEST: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """What some vectors of a layer contribute to the gradients of some entries."""
        layer = tl.program_id(2).to(tl.int64)
        begin = tl.multiple_of(tl.load(starts + layer), BEGIN)
        # Every number of a vector gets a column; between them are columns of zeros.
        SPREAD: tl.constexpr = PADDED // D
        column, k = tl.arange(0, PADDED), tl.program_id(1) * SOME + tl.arange(0, SOME)
        d, used = column // SPREAD, column % SPREAD == 0
        sums = tl.zeros([PADDED, SOME], tl.float32)
        first = tl.program_id(0) * LONGEST
        for start in range(first, tl.minimum(first + LONGEST, outputs * row), SIZE):
            m = start + tl.arange(0, SIZE)
            inside = m < outputs * row
            i = (m % row)[:, None] * D + d[None, :]
            scale = _scales(A, B, layer, m // row, i, inside, outputs, row * D, ranks)
            there = begin + m.to(tl.int64)[:, None] * D + d[None, :]
            g = tl.load(grads + there, mask=inside[:, None] & used[None, :], other=0.0).to(tl.float32)
            index = tl.load(indices + layer * outputs * row + m, mask=inside, other=0).to(tl.int32)
            is_entry = (index[:, None] == k[None, :]).to(tl.float32)
            sums = tl.dot(tl.trans(g * scale), is_entry, sums, input_precision=PRECISION)
        place = ((layer * tl.num_programs(0) + tl.program_id(0)) * K + k[None, :]) * D + d[:, None]
        tl.store(partial + place, sums, mask=(k[None, :] < K) & used[:, None])
