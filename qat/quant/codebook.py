"""Codebooks: weighted one-dimensional k-means, globally optimal, many layers at once.

In one dimension optimal clusters are intervals of the sorted values, so the optimum follows from
dynamic programming over the places where intervals may end (Wang & Song 2011, "Ckmeans.1d.dp").
Up to `EXACT` values, every value is such a place and the result is the optimum itself. For more, the
values are first summed into `FINE` equal bins (count, first and second moment, so that nothing is
lost but the position of a boundary inside a bin); the dynamic program lets intervals end at `COARSE`
+ 1 of the bins' edges, chosen where boundaries lie densest (see `_candidates`), and Lloyd steps then
move the boundaries bin by bin.

Bound: with boundaries restricted to bin edges, moving the optimum's boundary m between entries c < c'
to the nearest edge costs at most 2·(c' − c)·δ for each unit of weight between m and that edge, where
δ is the bin width: |(x−c)² − (x−c')²| = 2·(c'−c)·|x−m|. For the coarse edges the same bound holds with
their distance as δ, before the Lloyd steps take it down to the bins'; the tests hold the result within
1.0005 of the optimum on normal, heavy-tailed and outlier-ridden values.
"""

import torch
from torch import Tensor

from qat.errors import NumericsError

EXACT = 1024  # values up to which every one of them is a candidate boundary
FINE = 65_536  # bins of a large layer
COARSE = 512  # intervals between boundaries that the dynamic program may choose among
LLOYD_STEPS = 64


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
    if x_NM.shape[1] <= EXACT:
        x, order = x_NM.double().sort(dim=1)
        mass = torch.stack([weight_NM.double().gather(1, order)] * 3) * torch.stack([torch.ones_like(x), x, x * x])
        ends = _best_ends(_prefix(mass), _every_place(x), entries)
        return _fill(_means(_prefix(mass), ends)).float()
    mass, low, width = _histogram(x_NM, weight_NM)
    prefix = _prefix(mass)
    ends = _best_ends(prefix, _candidates(prefix), entries)
    return (_fill(_lloyd(prefix, ends)) * width + low).float()


def check(x: Tensor, weight: Tensor) -> None:
    """Refuses what has no best codebook; see `kmeans`."""
    if not torch.isfinite(x).all():
        raise NumericsError("cannot cluster: a value is NaN or infinite")
    if not torch.isfinite(weight).all() or (weight < 0).any():
        raise NumericsError("cannot cluster: a weight is negative, NaN or infinite")
    if not (weight.sum(dim=1) > 0).all():
        raise NumericsError("cannot cluster: all weights of a layer are zero")


def nearest(x: Tensor, codebook_NK: Tensor) -> Tensor:
    """Index, uint8, of the entry nearest to each value of `x` [N, …]; ties go to the larger entry."""
    middle_NK = (codebook_NK[:, 1:] + codebook_NK[:, :-1]) / 2
    index = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for k in range(middle_NK.shape[1]):
        index += x >= middle_NK[:, k].reshape(-1, *[1] * (x.dim() - 1))
    return index


def relative(weight: Tensor, S: Tensor) -> Tensor:
    """`W / S` where S may touch zero: such a weight is far out on its own side."""
    smallest = torch.finfo(S.dtype).tiny
    return weight / torch.where(S.abs() < smallest, smallest, S)


def _histogram(x_NM: Tensor, weight_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments [3, N, FINE] of each bin in units of the bin width, with origin and width [N, 1] of the bins."""
    low, high = x_NM.amin(1, keepdim=True).double(), x_NM.amax(1, keepdim=True).double()
    width = ((high - low) / (FINE - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    mass = torch.zeros(3, x_NM.shape[0], FINE, dtype=torch.float64, device=x_NM.device)
    for row in range(x_NM.shape[0]):
        place = (x_NM[row].double() - low[row]) / width[row]
        weight = weight_NM[row].double()
        bins = place.round().long()
        for power, moment in enumerate((weight, weight * place, weight * place * place)):
            mass[power, row] = torch.bincount(bins, moment, minlength=FINE)
    return mass, low, width


def _prefix(mass_3NM: Tensor) -> Tensor:
    """Sums [3, N, M+1] of everything before each place."""
    return torch.nn.functional.pad(mass_3NM.cumsum(-1), (1, 0))


def _every_place(x_NM: Tensor) -> Tensor:
    """Before, between and behind all values: [N, M+1]."""
    return torch.arange(x_NM.shape[1] + 1, device=x_NM.device).expand(x_NM.shape[0], -1)


def _candidates(prefix_3NM: Tensor) -> Tensor:
    """Bin edges [N, COARSE+1] as dense as the cube root of the weight around them.

    So dense do the best boundaries of many entries lie (Panter & Dite 1951): a far outlier, which
    stretches the range, takes few of them away from the bulk.
    """
    density = prefix_3NM[0, :, :: FINE // COARSE].diff(dim=1).clamp_min(0) ** (1 / 3)
    share = torch.nn.functional.pad(density.repeat_interleave(FINE // COARSE, dim=1).cumsum(1), (1, 0))
    wanted = torch.linspace(0, 1, COARSE + 1, dtype=share.dtype, device=share.device) * share[:, -1:]
    edges = torch.searchsorted(share, wanted)
    edges[:, 0], edges[:, -1] = 0, FINE
    return edges


def _best_ends(prefix_3NM: Tensor, candidates_NC: Tensor, entries: int) -> Tensor:
    """Interval ends [N, K+1], as places, by dynamic programming over the candidate ends."""
    w, s, q = (moment.gather(1, candidates_NC) for moment in prefix_3NM)
    spread_NCC = _inertia(*(moment[:, None, :] - moment[:, :, None] for moment in (w, s, q)))
    backwards = candidates_NC[:, :, None] > candidates_NC[:, None, :]
    spread_NCC.masked_fill_(backwards, torch.inf)
    cost_NC, froms = spread_NCC[:, 0], []
    for _ in range(entries - 1):
        cost_NC, chosen = (cost_NC[:, :, None] + spread_NCC).min(dim=1)
        froms.append(chosen)
    end = torch.full_like(candidates_NC[:, :1], candidates_NC.shape[1] - 1)
    ends = [end]
    for chosen in reversed(froms):
        end = chosen.gather(1, end)
        ends.append(end)
    ends.append(torch.zeros_like(end))
    return candidates_NC.gather(1, torch.cat(ends[::-1], dim=1))


def _inertia(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Weighted squared distance to the mean, from the moments of an interval."""
    return (second - first * first / weight.clamp_min(torch.finfo(weight.dtype).tiny)).clamp_min(0)


def _means(prefix_3NM: Tensor, ends_NE: Tensor) -> Tensor:
    """Weighted mean [N, K] of each interval; NaN where it is empty."""
    weight, first = (prefix_3NM[power].gather(1, ends_NE).diff(dim=1) for power in (0, 1))
    return torch.where(weight > 0, first / weight, torch.nan)


def _fill(mean_NK: Tensor) -> Tensor:
    """Ascending, empty intervals replaced by the largest mean."""
    largest = mean_NK.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return torch.where(mean_NK.isnan(), largest, mean_NK).sort(dim=1).values


def _lloyd(prefix_3NM: Tensor, ends_NE: Tensor) -> Tensor:
    """Moves interval ends to the middle between neighbouring means until they rest; means in bin units."""
    last = prefix_3NM.shape[-1] - 1
    for _ in range(LLOYD_STEPS):
        mean = _fill(_means(prefix_3NM, ends_NE))
        middle = ((mean[:, 1:] + mean[:, :-1]) / 2 + 0.5).round().long().clamp(0, last)
        moved = torch.cat([ends_NE[:, :1], middle, ends_NE[:, -1:]], dim=1)
        if torch.equal(moved, ends_NE):
            break
        ends_NE = moved
    return _means(prefix_3NM, ends_NE)
