"""Multiplies one token with a packed layer on CUDA: reads indices, codebook and scales once, never stores W.

`y_o = Σ_i codebook[index_oi] · S_oi · x_i` with `S = (A·g) @ B`. A program takes a tile of rows and columns, has all
its loads in flight at once, makes its part of S by one matrix instruction chain in fp16 and sums along its
columns. Such a product takes few microseconds, most of them waiting, so there is no loop to wait in. Where a
row is cut into several tiles, each leaves its partial sums in fp32, and the last one to arrive adds them in
the order of columns: still one launch, and the same bits at every run.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import dataclass
from functools import cache

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
    """The tile of a program: rows and columns (powers of two, at least 16), and its warps."""

    rows: int
    columns: int
    warps: int


def tiling(outputs: int, inputs: int) -> Tiling:
    """The tiling for a layer that was fastest on an H200 (`benchmarks/export.py product --sweep`).

    Rows that one program can take whole are, as meeting other programs takes time, as long as all programs
    find a multiprocessor of a large GPU; else small tiles, several of which share one.
    """
    columns = max(16, triton.next_power_of_2(inputs))
    if columns <= 1024 and triton.cdiv(outputs, 16) <= 132:
        return Tiling(16, columns, 8)
    return Tiling(32, min(columns, 256), 4)


class Arrivals:
    """Counters of how many programs of a row of tiles are done; all zero between two products.

    Each product takes the next ones, so that products in flight at the same time (streams, recorded graphs)
    share none until all have been given out.
    """

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        self.given = 0

    def take(self, count: int) -> int:
        """Reserves `count` counters and returns the first."""
        first = self.given if self.given + count <= len(self.counters) else 0
        self.given = first + count
        return first


@cache
def arrivals(device: torch.device) -> Arrivals:
    """The counters of a device. The first product creates them, so it must not be part of a recorded graph."""
    return Arrivals(device)


def product(
    x_I: Tensor,
    indices: Tensor,
    codebook: Tensor,
    A_OR: Tensor,
    g_R: Tensor,
    B_RI: Tensor,
    bits: int,
    cut: Tiling | None = None,
) -> Tensor:
    """`W x` [O] in the type of x. A·g and B enter in fp16; all sums, and products with the codebook and x, are fp32.

    Args:
        x_I: [I], contiguous.
        indices: the bit stream of a layer's indices, row by row.
        codebook: [2**bits] fp16.
        A_OR: [O, R], contiguous.
        g_R: [R].
        B_RI: [R, I], contiguous.
        bits: of an index, 1 to 8.
        cut: another tiling than the default.
    """
    (outputs, rank), inputs = A_OR.shape, x_I.shape[0]
    cut = cut or tiling(outputs, inputs)
    group = bits // math.gcd(bits, 8)
    each = 8 * group // bits
    tiles, splits = triton.cdiv(outputs, cut.rows), triton.cdiv(inputs, cut.columns)
    y_O = torch.empty(outputs, dtype=x_I.dtype, device=x_I.device)
    partial_SO, counters, first = y_O, y_O, 0
    if splits > 1:
        partial_SO = torch.empty(splits, outputs, dtype=torch.float32, device=x_I.device)
        counters, first = arrivals(x_I.device).counters, arrivals(x_I.device).take(tiles)
    _product[(tiles, splits)](
        *(x_I, indices, codebook, A_OR, g_R, B_RI, y_O, partial_SO, counters, first),
        *(outputs, inputs, inputs // each, indices.numel()),
        BITS=bits,
        RANK=rank,
        RANKS=max(16, triton.next_power_of_2(rank)),
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        BYTES=group,
        WHOLE=group <= 3 and inputs % each == 0,
        SPLIT=splits > 1,
        num_warps=cut.warps,
    )
    return y_O


if AVAILABLE:

    @triton.jit(do_not_specialize=["first"])
    def _product(
        x_ptr,
        index_ptr,
        codebook_ptr,
        A_ptr,
        g_ptr,
        B_ptr,
        y_ptr,
        partial_ptr,
        counter_ptr,
        first,
        outputs,
        inputs,
        width,  # groups in a row
        length,  # bytes of all rows
        BITS: tl.constexpr,
        RANK: tl.constexpr,
        RANKS: tl.constexpr,  # at least 16, the smallest size of a matrix instruction
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        BYTES: tl.constexpr,  # bytes of a group: the smallest number that holds whole indices
        WHOLE: tl.constexpr,  # whether rows consist of whole groups, each of which fits into a 32-bit word
        SPLIT: tl.constexpr,
    ):
        tile, split = tl.program_id(0), tl.program_id(1)
        row = tile * ROWS + tl.arange(0, ROWS)
        column = split * COLUMNS + tl.arange(0, COLUMNS)
        rank = tl.arange(0, RANKS)
        in_row, in_column, in_rank = row < outputs, column < inputs, rank < RANK
        inside = in_row[:, None] & in_column[None, :]
        inside_A = in_row[:, None] & in_rank[None, :]
        inside_B = in_rank[:, None] & in_column[None, :]
        # All loads start before the first one is used: a use waits at a barrier, and loads started after it
        # would wait a second time.
        if WHOLE:
            EACH: tl.constexpr = 8 * BYTES // BITS
            group = split * (COLUMNS // EACH) + tl.arange(0, COLUMNS // EACH)
            in_group = in_row[:, None] & (group < width)[None, :]
            place = index_ptr + (row[:, None] * width + group[None, :]) * BYTES
            stream = tl.load(place, mask=in_group, other=0)
            if BYTES == 3:
                second = tl.load(place + 1, mask=in_group, other=0)
                third = tl.load(place + 2, mask=in_group, other=0)
        else:
            bit = (row[:, None] * inputs + column[None, :]) * BITS
            in_next = inside & (bit // 8 + 1 < length)
            stream = tl.load(index_ptr + bit // 8, mask=inside, other=0)
            following = tl.load(index_ptr + bit // 8 + 1, mask=in_next, other=0)
        A = tl.load(A_ptr + row[:, None] * RANK + rank[None, :], mask=inside_A, other=0)
        g = tl.load(g_ptr + rank, mask=in_rank, other=0)
        x = tl.load(x_ptr + column, mask=in_column, other=0)
        if BITS <= 4:
            four_0 = _four(codebook_ptr, 0, BITS)
            if BITS >= 3:
                four_1 = _four(codebook_ptr, 4, BITS)
            if BITS == 4:
                four_2, four_3 = _four(codebook_ptr, 8, BITS), _four(codebook_ptr, 12, BITS)
        tl.debug_barrier()  # keeps the compiler from moving loads to where they are used
        B = tl.load(B_ptr + rank[:, None] * inputs + column[None, :], mask=inside_B, other=0)

        magnified = (A.to(tl.float32) * g.to(tl.float32)[None, :]).to(tl.float16)
        # The sum over one element keeps the compiler from moving A through shared memory early.
        S = tl.dot(tl.sum(magnified[:, :, None], axis=2), B.to(tl.float16))
        if WHOLE:
            if BYTES == 3:
                stream = (stream.to(tl.int32) << 16) | (second.to(tl.int32) << 8) | third.to(tl.int32)
            spread = tl.broadcast_to(stream[:, :, None], (ROWS, COLUMNS // EACH, EACH))
            word = spread.reshape(ROWS, COLUMNS).to(tl.int32)
            shift = (8 * BYTES - BITS - (tl.arange(0, COLUMNS) % EACH) * BITS)[None, :]
        else:
            word = (stream.to(tl.int32) << 8) | following.to(tl.int32)
            shift = 16 - BITS - bit % 8
        if BITS <= 4:
            scaled = (word << 4) >> shift  # the index times 16 in the low bits; earlier indices lie above it
            four = four_0
            if BITS == 3:
                four = tl.where(scaled & 64 != 0, four_1, four_0)
            elif BITS == 4:
                low, high = tl.where(scaled & 64 != 0, four_1, four_0), tl.where(scaled & 64 != 0, four_3, four_2)
                four = tl.where(scaled & 128 != 0, high, low)
            Q = (four >> (scaled & (48 if BITS > 1 else 16))).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            Q = tl.load(codebook_ptr + ((word >> shift) & ((1 << BITS) - 1)))
        y = tl.sum(S * Q.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        if SPLIT:
            tl.store(partial_ptr + split * outputs + row, y, mask=in_row)
            tl.debug_barrier()  # all threads of this program must be done before the counter rises
            splits = tl.num_programs(1)
            if tl.atomic_add(counter_ptr + first + tile, 1, sem="acq_rel") == splits - 1:
                total = tl.zeros((ROWS,), dtype=tl.float32)
                for part in range(splits):
                    # Bypasses this multiprocessor's cache, which does not see writes of other programs
                    total += tl.load(partial_ptr + part * outputs + row, mask=in_row, other=0, cache_modifier=".cg")
                tl.store(y_ptr + row, total.to(y_ptr.dtype.element_ty), mask=in_row)
                tl.store(counter_ptr + first + tile, 0)
        else:
            tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=in_row)

    @triton.jit
    def _four(codebook_ptr, first, BITS: tl.constexpr):
        """Four fp16 entries of a codebook (both of a codebook of two) in one word, where a shift looks them up."""
        bits = tl.load(codebook_ptr + first).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        bits |= (tl.load(codebook_ptr + first + 1).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 16
        if BITS > 1:
            bits |= (tl.load(codebook_ptr + first + 2).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 32
            bits |= tl.load(codebook_ptr + first + 3).to(tl.int16, bitcast=True).to(tl.int64) << 48
        return bits
