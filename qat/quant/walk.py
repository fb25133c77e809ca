"""The innermost loop of assignment: some columns, one after the other, for many rows at once.

Every column is a handful of operations on few numbers, so launches would take all the time, on a CPU too: there NumPy
walks, which begins an operation in a tenth of PyTorch's time, and on a GPU one Triton kernel, with the rows in
registers. Vectors take some columns at once and are searched by a matrix product, which is plain torch everywhere.
"""

from collections.abc import Iterator

import numpy as np
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
FEW = 16  # columns that a CPU walks before a product passes on what they changed, to the end of the panel
PANEL = 256  # columns of a panel, which stay in a CPU's caches meanwhile
WORTH = 2048  # rows that are worth a thread


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
        return
    columns, scale = wanted.cpu().mT.contiguous(), S.cpu().mT.contiguous()
    before = None if value is None else value.cpu().mT.contiguous()
    index.copy_(walk_columns(columns, scale, values.cpu(), spread.cpu(), before).mT)
    moved.copy_(columns.mT)


def walk_columns(
    wanted_NIO: Tensor, S_NIO: Tensor, values_NK: Tensor, spread_NII: Tensor, before_NIO: Tensor | None
) -> Tensor:
    """Fixes all columns, on a CPU; as `walk_block`, but for columns that lie one after the other in memory.

    They are walked a few at a time, by NumPy, as each column is a handful of operations on some thousand numbers: what
    those change in the rest of a panel is one product, and what a panel changes behind it another.

    Args:
        wanted_NIO: fp32; in its place come the changes.
        S_NIO: fp32.
        values_NK: fp32, ascending.
        spread_NII: fp32; entries above the diagonal are used.
        before_NIO: what changes are counted from; None counts from what is wanted.

    Returns:
        Indices [N, I, O] uint8.
    """
    index_NIO = torch.empty(wanted_NIO.shape, dtype=torch.uint8)
    for n, wanted_IO in enumerate(wanted_NIO):
        spread_II, middle_K = spread_NII[n], lookup.middles(values_NK[n]).numpy()
        for panel in _slices(0, len(wanted_IO), PANEL):
            for few in _slices(panel.start, panel.stop, FEW):
                known = spread_II[few, few].numpy(), values_NK[n].numpy(), middle_K
                parts = [wanted_IO[few], S_NIO[n, few], index_NIO[n, few]]
                parts += [] if before_NIO is None else [before_NIO[n, few]]
                lookup.on_cores(_walk_few, ((*known, *some) for some in _shared_out(parts)))
                _pass_on(wanted_IO, spread_II, few, slice(few.stop, panel.stop))
            _pass_on(wanted_IO, spread_II, panel, slice(panel.stop, None))
    return index_NIO


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


def _shared_out(parts_XJO: list[Tensor]) -> Iterator[list[np.ndarray]]:
    """Rows of the matrix as cores take them: each as many as another, but no fewer than are worth a thread."""
    size = max(WORTH, -(-parts_XJO[0].shape[1] // torch.get_num_threads()))
    for parts in zip(*(part.split(size, 1) for part in parts_XJO), strict=True):
        yield [part.numpy() for part in parts]


def _pass_on(moved_IO: Tensor, spread_II: Tensor, fixed: slice, to: slice) -> None:
    """Changes what is wanted in some columns by what was moved in others."""
    moved_IO[to].addmm_(spread_II[fixed, to].mT, moved_IO[fixed], alpha=-1)


def _walk_few(
    spread_JJ: np.ndarray,
    values_K: np.ndarray,
    middle_K: np.ndarray,
    wanted_JO: np.ndarray,
    S_JO: np.ndarray,
    index_JO: np.ndarray,
    before_JO: np.ndarray | None = None,
) -> None:
    """Fixes a few columns of some rows, whose changes come where they were wanted."""
    tiny = np.finfo(np.float32).tiny
    divisor_JO = np.where(np.abs(S_JO) < tiny, tiny, S_JO)
    relative, chosen, change = np.empty_like(wanted_JO[0]), np.empty_like(wanted_JO[0]), np.empty_like(wanted_JO)
    reached = np.empty((len(middle_K), len(chosen)), dtype=bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for j, (wanted_O, S_O, index_O) in enumerate(zip(wanted_JO, S_JO, index_JO, strict=True)):
            np.divide(wanted_O, divisor_JO[j], out=relative)
            if len(middle_K) < lookup.COMPARED:
                lookup.count(relative, middle_K, reached, index_O)
            else:
                index_O[:] = np.searchsorted(middle_K, relative, side="right")
            np.take(values_K, index_O, out=chosen, mode="clip")
            np.multiply(chosen, S_O, out=chosen)
            np.subtract(chosen, wanted_O if before_JO is None else before_JO[j], out=wanted_O)
            behind = change[: len(wanted_JO) - j - 1]
            np.multiply(spread_JJ[j, j + 1 :, None], wanted_O, out=behind)
            np.subtract(wanted_JO[j + 1 :], behind, out=wanted_JO[j + 1 :])


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
