"""Codebooks: weighted one-dimensional k-means, globally optimal to a proven bound, many layers at once.

In one dimension optimal clusters are intervals of the sorted values, so the optimum follows from
dynamic programming over the places where intervals may end (Wang & Song 2011, "Ckmeans.1d.dp").
Up to `EXACT` values, every value is such a place and the result is the optimum itself. For more, the
values are first summed into `FINE` equal bins (weight and first moment, so that nothing is lost but the
position of a boundary inside a bin); the dynamic program lets intervals end at `EDGES` of the bins' edges
for each entry, laid where boundaries lie densest (see `_candidates`), and Lloyd steps then move the
boundaries bin by bin.

Bound. Let g be the distance of two neighbouring entries of the optimum, m the boundary half way between
them, and δ and w the width and weight of the interval between candidate edges that holds m. Move m to the
nearer edge and leave the entries where they are: a value x in between changes its entry, which costs
(x−c')² − (x−c)² = 2·g·|x−m| ≤ g·δ for each unit of weight. The dynamic program finds the best partition
of this kind and the Lloyd steps never raise its inertia (bins are moved whole, by their means), so

    inertia ≤ optimum + Σ g·δ·w    over the K − 1 boundaries of the optimum,

whatever the values. How much that is: where the density ρ is even from one entry to the next, the moved
values cost at most 2·g·ρ·∫s ds up to s = δ/2, which is g·ρ·δ²/4, while the values between the two entries
have an inertia of ρ·g³/12: the excess is at most 3·(δ/g)² of the optimum. The candidates lie as densely as
the entries of a large codebook do, `EDGES` for each of them, so δ/g is 1/`EDGES` and the excess at most 0.00047
of the optimum. That step is an estimate: uneven densities, and bins wider than δ because of a far outlier,
are covered by the sum above and not by the percentage; the tests hold the result within 1.0005 of the
exact optimum on such values too.

Order plays no part: weights are rounded to whole numbers before they are summed (64-bit integers add up
to the same in any order, which floating-point sums by atomic operations on a GPU do not), so a layer gets
the same codebook, bit for bit, alone or in a stack and on every run. The rounding takes at most 2⁻⁶² of the
largest weight times the number of values from a weight, and 2⁻⁴⁶ of the total from a bin.
"""

import math

import torch
from torch import Tensor

from qat.errors import NumericsError

EXACT = 1024  # largest number of values for which each value is a candidate boundary
FINE = 65_536  # bins into which the values of a larger layer are summed
CELLS = 512  # groups of bins whose weights decide how densely candidate boundaries lie
EDGES = 80  # candidate boundaries per codebook entry; error below 0.05 %, as 3 / 80² < 0.0005
MAX_EDGES = 1280  # largest number of candidate boundaries, reached at 16 entries
APART = 64  # candidates from one whose best start is sought among all to the next, on a CPU
LLOYD_STEPS = 64
NUMBER = 8  # bytes of a number, be it whole or a fraction
COUNTED = 6 * NUMBER  # bytes of a value on its way into a bin
SUMMED, SUMS = 9 * NUMBER, 4 * NUMBER  # bytes of a bin while it is summed up to each edge, and once it is
# Numbers in a temporary tensor: fits into CPU caches; hides launch time on a GPU
AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 22}


def kmeans(x_NM: Tensor, weight_NM: Tensor, entries: int) -> Tensor:
    """The best codebook of each row.

    Args:
        x_NM: values, any float type; all rows are solved together.
        weight_NM: how much each value matters, not negative, with a positive sum in every row.
        entries: K, the codebook's size.

    Returns:
        [N, K] float32, ascending. Where a row has fewer distinct values than entries, the largest
        value fills the rest.

    Raises:
        NumericsError: a value or weight is NaN or infinite, a weight is negative, or a row's weights are all zero.
    """
    check(x_NM, weight_NM)
    low, width = _grid(x_NM)
    if x_NM.shape[1] <= EXACT:
        prefix = _prefix(*_sorted(x_NM, weight_NM, low, width))
        candidates = torch.arange(prefix.shape[2], device=x_NM.device).expand(len(x_NM), -1)
        ends = _best_ends(prefix, candidates, entries)
    else:
        weight, place = _histogram(x_NM, weight_NM, low, width)
        prefix = _prefix(weight, place)
        ends = _lloyd(place, prefix, _best_ends(prefix, _candidates(prefix, entries), entries))
    return (_fill(_means(prefix, ends)) * width + low).float()


def bytes_needed(rows: int, values: int, entries: int, kind: str) -> float:
    """The most memory that `kmeans` takes for so many rows of so many values, on a kind of device ("cpu" or "cuda").

    That is sums over all bins with what they are made of, or beside some values on their way into bins, or beside the
    costs of the intervals between all candidates, in three matrices of as many rows as are solved together.
    """
    edges = min(EDGES * entries, MAX_EDGES) + 1
    together = min(rows, max(1, AT_ONCE[kind] // edges**2))
    counted = COUNTED * min(rows * values, AT_ONCE[kind])
    return rows * FINE * SUMS + max(rows * FINE * (SUMMED - SUMS), counted, 3 * NUMBER * together * edges**2)


def check(x: Tensor, weight: Tensor) -> None:
    """Refuses values and weights for which no best codebook exists; see `kmeans`."""
    extremes = [part.double() for part in (x.amin(1), x.amax(1), weight.amin(1), weight.amax(1))]  # NaN stays NaN
    for row, (lowest, highest, lightest, heaviest) in enumerate(torch.stack(extremes, dim=1).tolist()):
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise NumericsError(f"cannot cluster row {row}: a value is NaN or infinite")
        if not (lightest >= 0 and heaviest < math.inf):
            raise NumericsError(f"cannot cluster row {row}: a weight is negative, NaN or infinite")
        if heaviest == 0:
            raise NumericsError(f"cannot cluster row {row}: all of its weights are zero")


def _grid(x_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Origin and unit [N, 1] of a scale on which values have places from 0 to FINE − 1."""
    low, high = x_NM.amin(1, keepdim=True).double(), x_NM.amax(1, keepdim=True).double()
    return low, ((high - low) / (FINE - 1)).clamp_min(torch.finfo(torch.float32).tiny)


def _unit(weight_NM: Tensor) -> Tensor:
    """The unit [N, 1] in which weights are counted, so that a row's sum is below 2⁶²."""
    return weight_NM.amax(1, keepdim=True).double() * (weight_NM.shape[1] * 2.0**-61)


def _sorted(x_NM: Tensor, weight_NM: Tensor, low: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and place [N, M] of each value, sorted by place."""
    x, order = x_NM.sort(dim=1)
    weight = (weight_NM.gather(1, order).double() / _unit(weight_NM)).round_()
    return weight, (x.double() - low) / width


def _histogram(x_NM: Tensor, weight_NM: Tensor, low: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and mean place [N, FINE] of the values in each bin, which reaches from half a place before to half behind.

    A slice of all rows at a time bounds the memory.
    """
    unit, rows = _unit(weight_NM), len(x_NM)
    total_NB, offset_NB = torch.zeros(2, rows, FINE, dtype=torch.long, device=x_NM.device)
    step = max(1, AT_ONCE[x_NM.device.type] // rows)
    for x, weight in zip(x_NM.split(step, dim=1), weight_NM.split(step, dim=1), strict=True):
        place = (x.double() - low) / width
        centre = place.round()
        counted = (weight.double() / unit).round_()
        bins = centre.long()
        total_NB.scatter_add_(1, bins, counted.long())
        offset_NB.scatter_add_(1, bins, place.sub_(centre).mul_(counted).round_().long())
    total = total_NB.double()
    return total, torch.arange(FINE, device=x_NM.device) + offset_NB.double() / total.clamp_min(1)


def _prefix(weight_NB: Tensor, place_NB: Tensor) -> Tensor:
    """Weight and first moment [2, N, B+1] of all bins before each edge: whole numbers, the row's weight being 2⁴⁶."""
    total = weight_NB.long().sum(1, keepdim=True).double()
    weight = (weight_NB * (2.0**46 / total)).round_()
    whole = torch.stack([weight, (weight * place_NB).round_()]).long()
    return torch.nn.functional.pad(whole.cumsum(-1), (1, 0)).double()


def _candidates(prefix_2NB: Tensor, entries: int) -> Tensor:
    """Candidate bin edges [N, C], with a density of the cube root of the weight around them.

    So dense do the best boundaries of many entries lie (Panter & Dite 1951): a far outlier, which
    stretches the range, takes few of them away from the bulk.
    """
    intervals = min(EDGES * entries, MAX_EDGES)
    density = prefix_2NB[0, :, :: FINE // CELLS].diff(dim=1) ** (1 / 3)  # at most 2^(46/3)
    whole = (density * 2.0**16).round_().long()  # whole numbers, so that sums do not depend on their order
    share = torch.nn.functional.pad(whole.repeat_interleave(FINE // CELLS, dim=1).cumsum(1), (1, 0))
    wanted = torch.arange(intervals + 1, device=share.device) * share[:, -1:] // intervals
    edges = torch.searchsorted(share, wanted)
    edges[:, 0], edges[:, -1] = 0, FINE
    return edges


def _best_ends(prefix_2NB: Tensor, candidates_NC: Tensor, entries: int) -> Tensor:
    """Interval ends [N, K+1], as places, by dynamic programming over the candidate ends."""
    rows = max(1, AT_ONCE[candidates_NC.device.type] // candidates_NC.shape[1] ** 2)
    parts = zip(prefix_2NB.split(rows, dim=1), candidates_NC.split(rows), strict=True)
    return torch.cat([_best_ends_of(prefix, candidates, entries) for prefix, candidates in parts])


def _best_ends_of(prefix_2NB: Tensor, candidates_NC: Tensor, entries: int) -> Tensor:
    cost_NCC = _costs(*(moment.gather(1, candidates_NC) for moment in prefix_2NB))
    best_NC, many = [cost_NCC[:, :, 0]], cost_NCC.device.type == "cpu" and cost_NCC[0].numel() > AT_ONCE["cpu"]
    longer = _longer if many else _longer_at_once
    for _ in range(entries - 1):
        best_NC.append(longer(best_NC[-1], cost_NCC))
    ends = [torch.full_like(candidates_NC[:, :1], candidates_NC.shape[1] - 1)]
    for before in best_NC[-2::-1]:
        last = cost_NCC.gather(1, ends[-1][:, :, None].expand(-1, -1, cost_NCC.shape[2]))[:, 0]
        ends.append((before + last).argmin(dim=1, keepdim=True))
    ends.append(torch.zeros_like(ends[0]))
    return candidates_NC.gather(1, torch.cat(ends[::-1], dim=1))


def _longer_at_once(best_NC: Tensor, cost_NCC: Tensor) -> Tensor:
    """The least inertia [N, C] of one interval more up to each candidate, of that up to each without it."""
    return (best_NC[:, None] + cost_NCC).amin(dim=2)


def _longer(best_NC: Tensor, cost_NCC: Tensor) -> Tensor:
    """The same in fewer operations, which have to be told apart on the host.

    The later an interval ends, the later its best start is (Wu 1991, "Optimal quantization by matrix searching"): the
    starts of every `APART`th candidate bound those of the candidates in between.
    """
    return torch.stack([_longer_of(best, cost) for best, cost in zip(best_NC, cost_NCC, strict=True)])


def _longer_of(best_C: Tensor, cost_CC: Tensor) -> Tensor:
    starts = [0, *(best_C + cost_CC[APART - 1 :: APART]).argmin(dim=1).tolist(), len(best_C) - 1]
    rows = cost_CC.split(APART)
    parts = zip(rows, starts, starts[1:], strict=False)
    return torch.cat([(best_C[first : last + 1] + row[:, first : last + 1]).amin(dim=1) for row, first, last in parts])


def _costs(weight_NC: Tensor, first_NC: Tensor) -> Tensor:
    """Inertia of the interval from candidate i to j at [n, j, i], up to a constant; infinite where j < i.

    The squares of the values add up to the same for every partition, so they are left out; what remains
    of an interval is −(its first moment)² / weight. Places are taken from the row's mean, where that
    loses least to rounding.
    """
    first_NC = first_NC - weight_NC * (first_NC[:, -1:] / weight_NC[:, -1:])
    weight, cost = (moment[:, :, None] - moment[:, None, :] for moment in (weight_NC, first_NC))
    cost.square_().div_(weight.clamp_min_(1)).neg_()
    backwards = torch.ones(cost.shape[1:], dtype=torch.bool, device=cost.device).triu_(1)
    return cost.masked_fill_(backwards, torch.inf)


def _means(prefix_2NB: Tensor, ends_NE: Tensor) -> Tensor:
    """Weighted mean [N, K] of each interval; NaN where it is empty."""
    weight, first = (moment.gather(1, ends_NE).diff(dim=1) for moment in prefix_2NB)
    return torch.where(weight > 0, first / weight, torch.nan)


def _fill(mean_NK: Tensor) -> Tensor:
    """The means in ascending order; empty intervals get the largest mean."""
    largest = mean_NK.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return torch.where(mean_NK.isnan(), largest, mean_NK).sort(dim=1).values


def _lloyd(place_NB: Tensor, prefix_2NB: Tensor, ends_NE: Tensor) -> Tensor:
    """Interval ends [N, K+1] after convergence: the mean of every bin is nearest to the entry of its interval."""
    for _ in range(LLOYD_STEPS):
        mean = _fill(_means(prefix_2NB, ends_NE))
        middle = (mean[:, 1:] + mean[:, :-1]) / 2
        moved = torch.cat([ends_NE[:, :1], torch.searchsorted(place_NB, middle), ends_NE[:, -1:]], dim=1)
        if torch.equal(moved, ends_NE):
            break
        ends_NE = moved
    return ends_NE
