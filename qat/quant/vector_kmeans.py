"""Codebooks of vectors: weighted k-means in a few dimensions, where no optimum can be had as it can for numbers.

Every number of a vector has a weight of its own: what is minimised is `Σ_m Σ_d weight_md (x_md - c_md)²`, c_m being the
entry that suits vector m best. Entries begin at vectors that are drawn by their distance from those drawn before
("k-means++", Arthur & Vassilvitskii 2007); Lloyd steps follow. A sample of the vectors will do: alternation with scales
(`qat.quant.fit`) goes on from here.

Shapes: N layers, M vectors of each, D numbers of a vector, K entries.
"""

import torch
from torch import Tensor

from qat.quant.kmeans import check
from qat.quant.lookup import closest, entry_sums

SAMPLE = 128  # vectors for each entry that are looked at
LLOYD_STEPS = 12


def kmeans(x_NM: Tensor, weight_NM: Tensor, entries: int, dim: int) -> Tensor:
    """A good codebook [N, K, D] of each row, fp32.

    A layer gets the same codebook alone or in a stack.

    Args:
        x_NM: vectors one after the other, [N, M · D].
        weight_NM: how much each number matters, not negative, with a positive sum in every row.
        entries: K.
        dim: D.

    Raises:
        NumericsError: a value or weight is NaN or infinite, a weight is negative, or a row's weights are all zero.
    """
    check(x_NM, weight_NM)
    x_NMD, weight_NMD = (_sampled(part.unflatten(1, (-1, dim)), SAMPLE * entries) for part in (x_NM, weight_NM))
    found = [_cluster(x, weight, entries) for x, weight in zip(x_NMD, weight_NMD, strict=True)]
    return torch.stack(found)


def _sampled(x_NMD: Tensor, count: int) -> Tensor:
    """About `count` vectors at the same random places of all rows, as even ones would all lie in a few columns."""
    total = x_NMD.shape[1]
    if total <= count:
        return x_NMD.float()
    some = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
    return x_NMD[:, some.to(x_NMD.device)].float()


def _cluster(x_MD: Tensor, weight_MD: Tensor, entries: int) -> Tensor:
    codebook_KD = _drawn(x_MD, weight_MD, entries)
    product_MD = weight_MD * x_MD
    for _ in range(LLOYD_STEPS):
        index_M = closest(weight_MD, product_MD, codebook_KD)
        mass, sums = (entry_sums(part.reshape(1, -1), index_M[None], entries) for part in (weight_MD, product_MD))
        codebook_KD = torch.where(mass > 0, sums / mass.clamp_min(1e-30), codebook_KD)
    return codebook_KD


def _drawn(x_MD: Tensor, weight_MD: Tensor, entries: int) -> Tensor:
    """Vectors [K, D] of which each is drawn by what it would cost with those before."""
    draws = torch.rand(entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x_MD.device)
    cost_M = weight_MD.sum(1)
    least_M, chosen = torch.full_like(cost_M, torch.inf), []
    for draw in draws.unbind():
        share_M = cost_M.double().cumsum(0)
        place = torch.searchsorted(share_M, draw * share_M[-1]).clamp_max(len(x_MD) - 1)
        chosen.append(x_MD[place])
        least_M = torch.minimum(least_M, (weight_MD * (x_MD - chosen[-1]).square()).sum(1))
        cost_M = least_M
    return torch.stack(chosen)
