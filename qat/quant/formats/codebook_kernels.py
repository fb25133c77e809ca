"""Triton kernels of the format `codebook`: weights written, and their gradients reduced, in single passes.

One launch serves all layers of a stack. Scales are recomputed from A and B tile by tile instead of being
stored; nothing of the size of a weight is written but the weight itself. Products are fp32 (`PRECISION`:
three TF32 products where the hardware has TF32, plain fp32 elsewhere), sums are taken in a fixed order.

Shapes: N layers, O outputs, I inputs, K codebook entries, R ranks.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from qat.quant.formats.base import ALIGNMENT, Parts
from qat.quant.formats.low_rank_kernels import AVAILABLE, TILE, columns, constants, padded, precision, tiles

if AVAILABLE:
    import triton
    import triton.language as tl


def write(indices: Tensor, operands: Parts, latent: Tensor | None, weights: Tensor, starts: Tensor) -> None:
    """`weight = codebook[indices] ⊙ A @ B`; see `Kernels.write`.

    Args:
        indices, latent, weights, starts: as there.
        operands: codebook [N, K], in any order; A [N, O, R], magnitudes included; B [N, R, I].
    """
    codebook, A, B = operands["codebook"], operands["A"].contiguous(), operands["B"].contiguous()
    layers, outputs, inputs = indices.shape
    grid = (tiles(inputs), tiles(outputs), layers)
    _write[grid](
        indices,
        codebook,
        A,
        B,
        indices if latent is None else latent,
        weights,
        starts,
        outputs,
        inputs,
        A.shape[2],
        K=codebook.shape[1],
        RANKS=padded(A.shape[2]),
        LATENT=latent is not None,
        TILE=TILE,
        PRECISION=precision(weights),
    )


def gradients(grads: Tensor, starts: Tensor, indices: Tensor, operands: Parts, found: Parts) -> None:
    """Gradients of codebook, A and B; see `Kernels.gradients`."""
    codebook, A, B = operands["codebook"], operands["A"].contiguous(), operands["B"].contiguous()
    layers, outputs, inputs = indices.shape
    rows = tiles(outputs)
    partial = torch.empty(layers, rows, codebook.shape[1], dtype=torch.float32, device=codebook.device)
    _reduce_rows[(rows, layers)](
        *(grads, starts, indices, codebook, A, B, found["A"], partial, outputs, inputs, A.shape[2]),
        **constants(grads, operands),
    )
    torch.sum(partial, 1, out=found["codebook"])
    columns(grads, starts, indices, operands, found["B"])


if AVAILABLE:
    BEGIN = tl.constexpr(ALIGNMENT)

    @triton.jit
    def _scales(A, B, layer, o, i, r, outputs, inputs, ranks, PRECISION: tl.constexpr):
        """A tile of B, and its product with one of A [TILE, TILE]."""
        a = tl.load(
            A + (layer * outputs + o[:, None]) * ranks + r[None, :],
            mask=(o[:, None] < outputs) & (r[None, :] < ranks),
            other=0.0,
        )
        b = tl.load(
            B + (layer * ranks + r[:, None]) * inputs + i[None, :],
            mask=(r[:, None] < ranks) & (i[None, :] < inputs),
            other=0.0,
        )
        return b, tl.dot(a, b, input_precision=PRECISION)

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
        inputs,
        ranks,
        K: tl.constexpr,
        RANKS: tl.constexpr,
        LATENT: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        layer = tl.program_id(2).to(tl.int64)
        o = tl.program_id(1) * TILE + tl.arange(0, TILE)
        i = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = (o[:, None] < outputs) & (i[None, :] < inputs)
        place = (layer * outputs + o[:, None]) * inputs + i[None, :]
        _, scale = _scales(A, B, layer, o, i, tl.arange(0, RANKS), outputs, inputs, ranks, PRECISION)
        if LATENT:
            wanted = tl.load(latent + place, mask=inside, other=0.0)
            chosen = tl.zeros([TILE, TILE], tl.int32)
            closest = tl.full([TILE, TILE], float("inf"), tl.float32)
            for k in range(K):
                away = tl.abs(wanted - tl.load(codebook + layer * K + k) * scale)
                chosen = tl.where(away < closest, k, chosen)
                closest = tl.minimum(away, closest)
            tl.store(indices + place, chosen.to(tl.uint8), mask=inside)
        else:
            chosen = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        value = tl.load(codebook + layer * K + chosen) * scale
        there = tl.multiple_of(tl.load(starts + layer), BEGIN) + o[:, None] * inputs + i[None, :]
        tl.store(weights + there, value.to(weights.dtype.element_ty), mask=inside)

    @triton.jit
    def _reduce_rows(
        grads,
        starts,
        indices,
        codebook,
        A,
        B,
        d_A,
        d_codebook,
        outputs,
        inputs,
        ranks,
        K: tl.constexpr,
        RANKS: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Some rows of A's gradient, and the contribution of these rows to the codebook's gradient."""
        layer = tl.program_id(1).to(tl.int64)
        begin = tl.multiple_of(tl.load(starts + layer), BEGIN)
        o = tl.program_id(0) * TILE + tl.arange(0, TILE)
        r, entry = tl.arange(0, RANKS), tl.arange(0, K)
        sum_A = tl.zeros([TILE, RANKS], tl.float32)
        sum_codebook = tl.zeros([K], tl.float32)
        for start in range(0, inputs, TILE):
            i = start + tl.arange(0, TILE)
            inside = (o[:, None] < outputs) & (i[None, :] < inputs)
            place = (layer * outputs + o[:, None]) * inputs + i[None, :]
            there = begin + o[:, None] * inputs + i[None, :]
            g = tl.load(grads + there, mask=inside, other=0.0).to(tl.float32)
            index = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
            b, scale = _scales(A, B, layer, o, i, r, outputs, inputs, ranks, PRECISION)
            through = g * scale
            for k in range(K):
                part = tl.sum(tl.sum(tl.where(index == k, through, 0.0), 1), 0)
                sum_codebook = tl.where(entry == k, sum_codebook + part, sum_codebook)
            d_scale = g * tl.load(codebook + layer * K + index)
            sum_A = tl.dot(d_scale, tl.trans(b), sum_A, input_precision=PRECISION)
        kept = (o[:, None] < outputs) & (r[None, :] < ranks)
        tl.store(d_A + (layer * outputs + o[:, None]) * ranks + r[None, :], sum_A, mask=kept)
        tl.store(d_codebook + (layer * tl.num_programs(0) + tl.program_id(0)) * K + entry, sum_codebook)
