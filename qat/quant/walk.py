"""The innermost loop of assignment: some columns, one after the other, for many rows at once.

Every column is a handful of operations on few numbers, so on a GPU launches would take all the time: there
one Triton kernel walks all of them with the rows in registers. Elsewhere the same in plain torch. Vectors take some
columns at once and are searched by a matrix product, which is plain torch everywhere.
"""

import torch
from torch import Tensor

from qat.quant import lookup

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS, Windows and CPU builds of torch
    triton = None

WIDTH = 64  # columns of a block, a power of two
ROWS_AT_ONCE = 16


def walk_block(
    wanted: Tensor, S: Tensor, values: Tensor, spread: Tensor, value: Tensor | None, index: Tensor, moved: Tensor
) -> None:
    """Fixes at most 64 columns; see `assign._walk`.

    Args:
        wanted: [N, O, J] fp32; may change.
        S: [N, O, J] fp32.
        values: [N, K] fp32, ascending.
        spread: [N, J, J] fp32; entries above the diagonal are used.
        value: [N, O, J] fp32 or None.
        index: [N, O, J] uint8, written.
        moved: [N, O, J] fp32, written.
    """
    if triton is not None and wanted.is_cuda:
        _walk_cuda(wanted, S, values, spread, value, index, moved)
    else:
        _walk_torch(wanted, S, values, spread, value, index, moved)


def _walk_torch(
    wanted: Tensor, S: Tensor, values: Tensor, spread: Tensor, value: Tensor | None, index: Tensor, moved: Tensor
) -> None:
    """The same in few operations a column, as each handles few numbers: one search finds the nearest values."""
    columns = wanted.mT.contiguous()  # the numbers of a column are adjacent in memory
    scale = S.mT.contiguous()
    divisor, middle = lookup.nonzero(scale), lookup.middles(values)
    before = columns if value is None else value.mT.contiguous()
    chosen, change = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    for j in range(columns.shape[1]):
        found = torch.searchsorted(middle, columns[:, j] / divisor[:, j], right=True)
        chosen[:, j] = found
        torch.sub(values.gather(1, found).mul_(scale[:, j]), before[:, j], out=change[:, j])
        columns[:, j + 1 :].addcmul_(spread[:, j, j + 1 :, None], change[:, j, None], value=-1)
    index.copy_(chosen.mT)
    moved.copy_(change.mT)


def walk_vectors(
    wanted: Tensor,
    S: Tensor,
    vectors: Tensor,
    spread: Tensor,
    metric: Tensor,
    value: Tensor | None,
    index: Tensor,
    moved: Tensor,
) -> None:
    """As `walk_block` for vectors of D columns, each the best one under `(w - s c) M (w - s c)ᵀ`.

    Args:
        wanted, S, value, moved: as there.
        vectors: [N, K, D] fp32, in any order.
        spread: [N, J, J] fp32; what lies right of the blocks on the diagonal is used.
        metric: [N, J / D, D, D] fp32, the M of each block, symmetric.
        index: [N, O, J / D], written.
    """
    dim = vectors.shape[2]
    a, b = torch.tril_indices(dim, dim, device=vectors.device)
    pairs = vectors[..., a] * vectors[..., b] * torch.where(a == b, 1, 2)
    table = torch.cat([pairs, -2 * vectors], 2).mT.contiguous()
    for block in range(wanted.shape[2] // dim):
        here, behind = slice(block * dim, (block + 1) * dim), slice((block + 1) * dim, None)
        w, s, M = wanted[:, :, here], S[:, :, here], metric[:, block]
        coefficients = torch.cat([s[..., a] * s[..., b] * M[:, None, a, b], (w @ M) * s], 2)
        chosen = (coefficients @ table).argmin(2)
        found = vectors.gather(1, chosen[..., None].expand(-1, -1, dim)).mul_(s)
        change = found - (w if value is None else value[:, :, here])
        index[:, :, block], moved[:, :, here] = chosen, change
        wanted[:, :, behind] -= change @ spread[:, here, behind]


def _walk_cuda(
    wanted: Tensor, S: Tensor, values: Tensor, spread: Tensor, value: Tensor | None, index: Tensor, moved: Tensor
) -> None:
    layers, rows, columns = wanted.shape
    before = wanted if value is None else value
    _walk_kernel[layers, triton.cdiv(rows, ROWS_AT_ONCE)](
        *(wanted, *wanted.stride(), S, *S.stride(), before, *before.stride(), spread, *spread.stride()),
        *(index, *index.stride(), moved, *moved.stride(), values.contiguous(), rows, columns),
        VALUES=values.shape[1],
        FROM_WANTED=value is None,
        ROWS=ROWS_AT_ONCE,
        WIDTH=WIDTH,
        SMALLEST=torch.finfo(torch.float32).tiny,
        num_warps=1,
    )


if triton is not None:

    @triton.jit
    def _place(n, row, column, n_stride, o_stride, j_stride):  # type: ignore[no-untyped-def]
        """Offsets [ROWS, WIDTH] into a tensor [N, O, J]."""
        return n * n_stride + row[:, None] * o_stride + column[None, :] * j_stride

    @triton.jit
    def _walk_kernel(  # type: ignore[no-untyped-def]
        wanted_p, wanted_n, wanted_o, wanted_j, S_p, S_n, S_o, S_j, before_p, before_n, before_o, before_j,
        spread_p, spread_n, spread_j, spread_k, index_p, index_n, index_o, index_j, moved_p, moved_n, moved_o, moved_j,
        values_p, rows, columns,
        VALUES: tl.constexpr, FROM_WANTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
        SMALLEST: tl.constexpr,
    ):  # fmt: skip
        """Processes `ROWS` rows of one layer; their block of columns stays in registers throughout."""
        n = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wanted = tl.load(wanted_p + _place(n, row, column, wanted_n, wanted_o, wanted_j), mask=inside, other=0.0)
        scale = tl.load(S_p + _place(n, row, column, S_n, S_o, S_j), mask=inside, other=1.0)
        before = tl.load(before_p + _place(n, row, column, before_n, before_o, before_j), mask=inside, other=0.0)
        index = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
        moved = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for j in range(columns):
            here = column[None, :] == j
            w = tl.sum(tl.where(here, wanted, 0.0), axis=1)
            s = tl.sum(tl.where(here, scale, 0.0), axis=1)
            relative = w / tl.where(tl.abs(s) < SMALLEST, SMALLEST, s)
            chosen = tl.zeros((ROWS,), dtype=tl.int32)
            for k in tl.static_range(VALUES - 1):
                middle = (tl.load(values_p + n * VALUES + k) + tl.load(values_p + n * VALUES + k + 1)) / 2
                chosen += (relative >= middle).to(tl.int32)
            grid = tl.load(values_p + n * VALUES + chosen) * s
            change = grid - (w if FROM_WANTED else tl.sum(tl.where(here, before, 0.0), axis=1))
            across = tl.load(
                spread_p + n * spread_n + j * spread_j + column * spread_k,
                mask=(column > j) & (column < columns),
                other=0.0,
            )
            wanted -= change[:, None] * across[None, :]
            index = tl.where(here, chosen[:, None], index)
            moved = tl.where(here, change[:, None], moved)
        tl.store(index_p + _place(n, row, column, index_n, index_o, index_j), index.to(tl.uint8), mask=inside)
        tl.store(moved_p + _place(n, row, column, moved_n, moved_o, moved_j), moved, mask=inside)
