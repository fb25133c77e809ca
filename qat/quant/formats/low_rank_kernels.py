"""What the Triton kernels of `codebook` and `vector` share: formats with a learned codebook times a low-rank scale.

A codebook of numbers is one of vectors of a single number, D = 1.

Shapes: N layers, O outputs, I inputs, K entries of D numbers, R ranks; J = I / D indices of a row.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from qat.quant.formats.base import ALIGNMENT, Parts

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    AVAILABLE = False
else:
    AVAILABLE = True

TILE = 64  # outputs and inputs of the tile that a program processes


def tiles(size: int) -> int:
    """Tiles that so many outputs or inputs take."""
    return -(-size // TILE)


def padded(rank: int) -> int:
    """Number of ranks padded for the matrix units: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


def precision(x: Tensor) -> str:
    """Of products in fp32 on the GPU of `x`, as Triton says it."""
    return "tf32x3" if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) else "ieee"


def constants(grads: Tensor, operands: Parts) -> dict[str, Any]:
    """What all kernels that reduce gradients are compiled for."""
    exact = precision(grads)
    return {
        "K": operands["codebook"].shape[1],
        "RANKS": padded(operands["A"].shape[2]),
        "TILE": TILE,
        # Gradients of 16 bits have no more digits than TF32.
        "PRECISION": exact if grads.dtype == torch.float32 else exact.removesuffix("x3"),
    }


def columns(grads: Tensor, starts: Tensor, indices: Tensor, operands: Parts, found: Tensor) -> None:
    """B's gradient [N, R, I] into `found`; see `Kernels.gradients`.

    Args:
        grads, starts: as there.
        indices: [N, O, J].
        operands: codebook [N, K] or [N, K, D], A [N, O, R], B [N, R, I].
        found: fp32.
    """
    (layers, outputs, row), inputs = indices.shape, operands["B"].shape[2]
    _reduce_columns[(tiles(inputs), layers)](
        *(grads, starts, indices, operands["codebook"], operands["A"].contiguous(), found),
        *(outputs, row, operands["A"].shape[2]),
        D=inputs // row,
        **constants(grads, operands),
        num_stages=1,  # loads ahead of their use are off: with codebook lookups they take three times as long
    )


if AVAILABLE:
    BEGIN = tl.constexpr(ALIGNMENT)

    @triton.jit
    def _reduce_columns(
        grads,
        starts,
        indices,
        codebook,
        A,
        d_B,
        outputs,
        row,
        ranks,
        K: tl.constexpr,
        D: tl.constexpr,
        RANKS: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Some columns of B's gradient."""
        layer = tl.program_id(1).to(tl.int64)
        begin = tl.multiple_of(tl.load(starts + layer), BEGIN)
        i, r = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, RANKS)
        sum_B = tl.zeros([TILE, RANKS], tl.float32)  # transposed, because the ranks of A are adjacent in memory
        for start in range(0, outputs, TILE):
            o = start + tl.arange(0, TILE)
            d_scale = through_values(grads, begin, indices, codebook, layer, o, i, outputs, row, K, D)
            known = (o[:, None] < outputs) & (r[None, :] < ranks)
            a = tl.load(A + (layer * outputs + o[:, None]) * ranks + r[None, :], mask=known, other=0.0)
            sum_B = tl.dot(tl.trans(d_scale), a, sum_B, input_precision=PRECISION)
        kept = (r[None, :] < ranks) & (i[:, None] < row * D)
        tl.store(d_B + (layer * ranks + r[None, :]) * (row * D) + i[:, None], sum_B, mask=kept)

    @triton.jit
    def through_values(grads, begin, indices, codebook, layer, o, i, outputs, row, K: tl.constexpr, D: tl.constexpr):
        """The gradient [TILE, TILE] of the scales at rows o and columns i."""
        inside = (o[:, None] < outputs) & (i[None, :] < row * D)
        g = tl.load(grads + begin + o[:, None] * (row * D) + i[None, :], mask=inside, other=0.0).to(tl.float32)
        place = (layer * outputs + o[:, None]) * row + (i // D)[None, :]
        index = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        return g * tl.load(codebook + layer * K * D + index * D + (i % D)[None, :])
