"""One token through a packed layer on CUDA: indices, table and scales are read once, W never exists.

With `Q = LUT[indices]` [O, I] the product `y = (Q ⊙ (A·g) @ B) x` is `y_o = Σ_r (A·g)_or Z_or` where
`Z = Q (B ⊙ x)ᵀ` [O, R]: a small matrix product whose left side is looked up tile by tile. Each program
makes some rows of Z, walking along I. A step reads `bits` for each weight instead of the 16 of a dense
weight, and one column of B for a tile of rows.
"""

# Triton gives the arguments of kernels its own meaning.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # no CUDA build of torch, or a platform without Triton
    AVAILABLE = False


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: rows and columns of a tile, warps of a program, loads in flight."""

    rows: int = 16
    columns: int = 128
    warps: int = 4
    stages: int = 3


def product(
    x_I: Tensor,
    indices: Tensor,
    lut: Tensor,
    A_OR: Tensor,
    g_R: Tensor,
    B_RI: Tensor,
    bits: int,
    tiling: Tiling | None = None,
) -> Tensor:
    """`W x` [O] in the type of x, accumulated in fp32, products in TF32 (ten bits of mantissa, as in fp16).

    Args:
        x_I: [I], contiguous.
        indices: the bit stream of a layer's indices, row by row.
        lut: [2**bits].
        A_OR: [O, R], contiguous.
        g_R: [R].
        B_RI: [R, I], contiguous.
        bits: of an index, 1 to 8.
        tiling: another cut than the default.
    """
    (outputs, rank), inputs = A_OR.shape, x_I.shape[0]
    cut = tiling or Tiling()
    y_O = torch.empty(outputs, dtype=x_I.dtype, device=x_I.device)
    _product[(triton.cdiv(outputs, cut.rows),)](
        *(x_I, indices, lut, A_OR, g_R, B_RI, y_O, outputs, inputs, indices.numel()),
        BITS=bits,
        RANK=rank,
        RANKS=max(16, triton.next_power_of_2(rank)),
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return y_O


if AVAILABLE:

    @triton.jit
    def _product(
        x_ptr,
        index_ptr,
        lut_ptr,
        A_ptr,
        g_ptr,
        B_ptr,
        y_ptr,
        outputs,
        inputs,
        length,
        BITS: tl.constexpr,
        RANK: tl.constexpr,
        RANKS: tl.constexpr,  # at least 16, the least a matrix instruction takes
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        rank = tl.arange(0, RANKS)
        in_row, in_rank = row < outputs, rank < RANK
        Z = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for start in range(0, inputs, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            in_column = column < inputs
            inside = in_row[:, None] & in_column[None, :]
            bit = (row[:, None] * inputs + column[None, :]) * BITS
            byte = bit // 8
            word = tl.load(index_ptr + byte, mask=inside, other=0).to(tl.int32)
            if 8 % BITS == 0:
                index = (word >> (8 - BITS - bit % 8)) & ((1 << BITS) - 1)
            else:  # an index may reach into the next byte
                following = tl.load(index_ptr + byte + 1, mask=inside & (byte + 1 < length), other=0).to(tl.int32)
                index = (((word << 8) | following) >> (16 - BITS - bit % 8)) & ((1 << BITS) - 1)
            Q = tl.load(lut_ptr + index).to(tl.float32)
            B = tl.load(
                B_ptr + rank[:, None] * inputs + column[None, :],
                mask=in_rank[:, None] & in_column[None, :],
                other=0,
            )
            x = tl.load(x_ptr + column, mask=in_column, other=0).to(tl.float32)
            Z = tl.dot(Q, tl.trans(B.to(tl.float32) * x[None, :]), acc=Z, input_precision="tf32")
        A = tl.load(A_ptr + row[:, None] * RANK + rank[None, :], mask=in_row[:, None] & in_rank[None, :], other=0)
        g = tl.load(g_ptr + rank, mask=in_rank, other=0)
        y = tl.sum(Z * A.to(tl.float32) * g.to(tl.float32)[None, :], axis=1)
        tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=in_row)
