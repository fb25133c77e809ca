"""Values by their indices and indices by values: the few operations that quantized weights are made of.

A value is a number, or a *vector* of numbers for as many weights, which follow each other in a row and share an index.

Shapes: N layers, which a single layer's tensors may be without, O outputs, I inputs, K values of each layer; D numbers
of a vector, J = I / D indices of a row (I where values are numbers).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.machine import exact_matmul

SHARED = 1 << 18  # weights that a core of a CPU looks up, or finds the nearest values of, before it takes the next ones
COUNTED = 1 << 15  # numbers that a core of a CPU adds up at a time: their copies of 64 bits stay in its caches
IN_CACHES = 1 << 19  # weights of which a CPU's caches hold what a fit computes
COMPARED = 16  # largest number of values that a CPU compares one after the other
AT_HAND = 1 << 15  # weights that are compared at a time: the results stay in a core's caches
# Numbers in a temporary tensor of all vectors' distances: fits into CPU caches; hides launch time on a GPU
AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}


def together(weight_NOI: Tensor) -> list[slice]:
    """Rows that are looked at together: all, or on a CPU so few that what is computed of them stays in its caches."""
    layers, outputs, inputs = weight_NOI.shape
    size = max(1, IN_CACHES // (layers * inputs)) if weight_NOI.device.type == "cpu" else outputs
    return [slice(start, start + size) for start in range(0, outputs, size)]


def are_vectors(values: Tensor, of_rows: Tensor) -> bool:
    """Whether values are vectors, [N, K, D]: as many dimensions as what lies in rows, such as indices [N, O, J]."""
    return values.dim() > 1 and values.dim() == of_rows.dim()


def look_up(values_NK: Tensor, index_NOI: Tensor) -> Tensor:
    """`values[index]` [N, O, I], each layer with its own values [N, K], or vectors [N, K, D] at indices [N, O, J].

    PyTorch gathers by 64-bit indices, which have to be made first; NumPy needs none, so a CPU goes by it.
    """
    if are_vectors(values_NK, index_NOI):
        return _look_up_vectors(values_NK, index_NOI)
    if values_NK.dim() == 1:
        return look_up(values_NK[None], index_NOI[None])[0]
    if values_NK.device.type != "cpu":
        return values_NK.gather(1, index_NOI.flatten(1).long()).view(index_NOI.shape)
    found_NOI = torch.empty(index_NOI.shape, dtype=values_NK.dtype)
    if values_NK.dtype == torch.bfloat16:  # which NumPy lacks
        return look_up(values_NK.float(), index_NOI).bfloat16()
    on_cores(_take, _pieces(values_NK, index_NOI, found_NOI))
    return found_NOI


def _take(values_K: np.ndarray, index_M: np.ndarray, found_M: np.ndarray) -> None:
    np.take(values_K, index_M, out=found_M, mode="clip")  # other modes write to a copy first


def on_cores(work: Callable[..., None], pieces: Iterable[tuple[Any, ...]]) -> None:
    """Does some work on every piece, in as many threads as PyTorch has: NumPy lets go of Python's lock."""
    pieces = list(pieces)
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda piece: work(*piece), pieces):
            pass


def _pieces(of_layer_NX: Tensor, *of_weights_NOI: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
    """What each layer has, beside some of its weights at a time in every other tensor, flat."""
    for of_layer_X, *layer in zip(of_layer_NX.detach(), *of_weights_NOI, strict=True):
        for parts in zip(*(x.detach().flatten().split(SHARED) for x in layer), strict=True):
            yield of_layer_X.numpy(), *(part.numpy() for part in parts)


def _look_up_vectors(values_NKD: Tensor, index_NOJ: Tensor) -> Tensor:
    if values_NKD.dim() == 2:
        found_MD = values_NKD.index_select(0, index_NOJ.flatten().long())
        return found_MD.view(*index_NOJ.shape[:-1], -1)
    return torch.stack([_look_up_vectors(*one) for one in zip(values_NKD, index_NOJ, strict=True)])


def entry_sums(x_NOI: Tensor, index_NOI: Tensor, entries: int) -> Tensor:
    """Sums [N, K] of the numbers that have the same index; [N, K, D] with indices [N, O, J] of vectors.

    On a GPU one masked reduction an entry: a scatter would queue up at a few addresses, in any order. On a CPU counts
    in float64, which pass over the numbers once.
    """
    if x_NOI.dim() == 2:
        return entry_sums(x_NOI[None], index_NOI[None], entries)[0]
    if (dim := x_NOI.shape[2] // index_NOI.shape[2]) > 1:
        return _vector_sums(x_NOI, index_NOI, entries, dim)
    if x_NOI.device.type != "cpu":
        return torch.stack([(x_NOI * (index_NOI == k)).sum(dim=(1, 2)) for k in range(entries)], dim=1)
    return torch.stack([_counted(*layer, entries) for layer in zip(x_NOI, index_NOI, strict=True)]).to(x_NOI.dtype)


def _counted(x_OI: Tensor, index_OI: Tensor, entries: int) -> Tensor:
    """Sums [K], float64, of a layer's numbers on a CPU: those of pieces, added up in their order whatever the cores.

    A count of PyTorch's keeps one core busy, so several are made at a time.
    """
    pieces = list(zip(index_OI.flatten().split(COUNTED), x_OI.flatten().split(COUNTED), strict=True))

    def count(piece: tuple[Tensor, Tensor]) -> Tensor:
        index, x = piece
        return torch.bincount(index, x.double(), entries)

    cores = min(torch.get_num_threads(), len(pieces))
    if cores < 2:
        return torch.stack([count(piece) for piece in pieces]).sum(0)
    with ThreadPoolExecutor(cores) as pool:
        return torch.stack(list(pool.map(count, pieces))).sum(0)


def _vector_sums(x_NOI: Tensor, index_NOJ: Tensor, entries: int, dim: int) -> Tensor:
    """As `entry_sums` for vectors; on a GPU a product with the indices' indicators, some of them at a time."""
    if x_NOI.device.type == "cpu":
        place = index_NOJ.long()[..., None] * dim + torch.arange(dim)
        return entry_sums(x_NOI, place.flatten(2), entries * dim).unflatten(1, (entries, dim))
    sums_NKD = torch.zeros(len(x_NOI), entries, dim, dtype=x_NOI.dtype, device=x_NOI.device)
    each_K, size = torch.arange(entries, device=x_NOI.device), max(1, AT_ONCE["cuda"] // entries)
    with exact_matmul():
        for x_OI, index_OJ, sums_KD in zip(x_NOI, index_NOJ, sums_NKD, strict=True):
            parts = zip(x_OI.reshape(-1, dim).split(size), index_OJ.flatten().split(size), strict=True)
            for x_MD, index_M in parts:
                sums_KD.addmm_((index_M == each_K[:, None]).to(x_MD.dtype), x_MD)
    return sums_NKD


def nearest_vector(weight_NOI: Tensor, S_NOI: Tensor, values_NKD: Tensor) -> Tensor:
    """Index [N, O, J] of the vector c with the smallest `Σ (w - s c)²` over the D weights that share it.

    The type is `index_type`'s. Of equally near ones it is any.
    """
    if values_NKD.dim() == 3:
        each = zip(weight_NOI, S_NOI, values_NKD, strict=True)
        return torch.stack([nearest_vector(*layer) for layer in each])
    dim = values_NKD.shape[1]
    s_MD, w_MD = S_NOI.reshape(-1, dim), weight_NOI.reshape(-1, dim)
    index = closest(s_MD.square(), s_MD * w_MD, values_NKD)
    return index.view(*weight_NOI.shape[:-1], -1)


def closest(square_MD: Tensor, product_MD: Tensor, values_KD: Tensor) -> Tensor:
    """Index [M] of the vector c with the smallest `Σ square c² - 2 product c`; one matrix product and a search."""
    table_FK = torch.cat([values_KD.square(), -2 * values_KD], 1).mT.contiguous()
    size = max(1, AT_ONCE.get(square_MD.device.type, 1 << 20) // len(values_KD))
    parts = zip(square_MD.split(size), product_MD.split(size), strict=True)
    with exact_matmul():
        found = [(torch.cat(part, 1) @ table_FK).argmin(1) for part in parts]
    return torch.cat(found).to(index_type(len(values_KD)))


def index_type(entries: int) -> torch.dtype:
    """What holds indices below so many entries, at most 2^15."""
    return torch.uint8 if entries <= 256 else torch.int16


def nearest(x: Tensor, values_NK: Tensor) -> Tensor:
    """Index, uint8, of the value nearest to each number of `x` [N, …], values ascending; ties go to the larger one.

    On a GPU one search, which is one launch. A CPU compares many numbers at once with each of a few boundaries
    instead, by NumPy, which spends a tenth of PyTorch's time on it.
    """
    middle_NK = middles(values_NK)
    if x.device.type != "cpu" or values_NK.shape[-1] > COMPARED:
        found = torch.searchsorted(middle_NK, x.flatten(values_NK.dim() - 1).contiguous(), right=True, out_int32=True)
        return found.to(torch.uint8).view(x.shape)
    index = torch.empty(x.shape, dtype=torch.uint8)
    layers = (middle_NK, x, index) if values_NK.dim() == 2 else (middle_NK[None], x[None], index[None])
    on_cores(_compare, _pieces(*layers))
    return index


def _compare(middle_K: np.ndarray, x_M: np.ndarray, index_M: np.ndarray) -> None:
    """Writes the indices of the nearest values, some at a time."""
    reached = np.empty((len(middle_K), min(AT_HAND, len(x_M))), dtype=bool)
    for start in range(0, len(x_M), AT_HAND):
        x, index = x_M[start : start + AT_HAND], index_M[start : start + AT_HAND]
        count(x, middle_K, reached[:, : len(x)], index)


def count(x_M: np.ndarray, middle_K: np.ndarray, reached_KM: np.ndarray, index_M: np.ndarray) -> None:
    """Writes how many of a few boundaries each number reaches; `reached_KM`, of booleans, is work space."""
    np.greater_equal(x_M, middle_K[:, None], out=reached_KM)
    np.add.reduce(reached_KM.view(np.uint8), axis=0, dtype=np.uint8, out=index_M)


def snapped(x: Tensor, values_K: Tensor) -> Tensor:
    """The value nearest to each number of `x`, which is used up; of two as near either.

    A CPU rounds where values lie evenly: a few passes over the numbers instead of a comparison with each boundary.
    """
    step_K = values_K.diff()
    if x.device.type != "cpu" or not torch.equal(step_K, step_K[:1].expand_as(step_K)):
        return look_up(values_K, nearest(x, values_K))
    place = x.sub_(values_K[0]).div_(step_K[0]).round_().clamp_(0, len(values_K) - 1)
    return place.mul_(step_K[0]).add_(values_K[0])


def middles(values_NK: Tensor) -> Tensor:
    """Boundaries [N, K − 1] between neighbouring values."""
    return ((values_NK[..., 1:] + values_NK[..., :-1]) / 2).contiguous()


def relative(weight: Tensor, S: Tensor) -> Tensor:
    """`W / S`; where S is zero, the result is large and has the sign of W."""
    return weight / nonzero(S)


def nonzero(S: Tensor) -> Tensor:
    """S with zeros replaced by the smallest normal number; S itself where there are none."""
    smallest = torch.finfo(S.dtype).tiny
    if S.device.type == "cpu" and S.numel() and bool(S.abs().amin() >= smallest):
        return S  # which takes a tenth of the time
    return torch.where(S.abs() < smallest, smallest, S)
