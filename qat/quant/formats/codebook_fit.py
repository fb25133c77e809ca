"""Fits codebooks with low-rank scales to stacks of layers of one shape; `qat.quant.fit` says in which order.

Under a diagonal importance codebook, A and B are each the least weighted squares given the others. A and B go
further than to their minimum (successive over-relaxation, Young 1954), by which the error falls faster. Under the
whole curvature they follow conjugate gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant import assign, least_squares, lookup
from qat.quant.curvature import Curvature
from qat.quant.formats.base import Cluster, Fitted

CG_ITERATIONS = 4
# Weights of a layer that a round fits the codebook to; the first fit uses all, as a few weights may decide it
SAMPLE = 1 << 18
RELAXATION = 1.5  # step length, relative to the way to the minimum; below 2 the error cannot rise
FARTHEST = 8.0  # in root mean squares; larger relative weights are clipped, as they reflect a poor scale


@dataclass(frozen=True)
class Codebooks:
    """Quantized layers: `W ≈ codebook[index] ⊙ (A @ B)`, the codebook [N, K], or [N, K, D] if it has vectors."""

    index_NOI: Tensor
    codebook_NK: Tensor
    A_NOR: Tensor
    B_NRI: Tensor

    def scale(self) -> Tensor:
        """S [N, O, I]."""
        return self.A_NOR @ self.B_NRI

    def weight(self) -> Tensor:
        """The quantized weight [N, O, I]."""
        return lookup.look_up(self.codebook_NK, self.index_NOI) * self.scale()

    @staticmethod
    def of(fitted: Fitted) -> "Codebooks":
        """Converts from the form that all formats share."""
        return Codebooks(fitted.index_NOI, *(fitted.operands[name] for name in ("codebook", "A", "B")))

    def fitted(self) -> Fitted:
        """Converts to the form that all formats share."""
        return Fitted(self.index_NOI, {"codebook": self.codebook_NK, "A": self.A_NOR, "B": self.B_NRI})


def start(weight_NOI: Tensor, h_NI: Tensor, entries: int, rank: int, cluster: Cluster) -> Codebooks:
    """Scales from group means, then the codebook that `cluster` makes for the weights relative to them."""
    A, B = least_squares.initial(weight_NOI, rank)
    S = A @ B
    x = lookup.relative(weight_NOI, S).flatten(1)
    matters = (S.square() * h_NI[:, None]).flatten(1)
    spread = (matters * x.square()).sum(1, keepdim=True).div_(matters.sum(1, keepdim=True).clamp_min_(1e-30)).sqrt_()
    codebook = cluster(x.clamp(-FARTHEST * spread, FARTHEST * spread), matters, entries)
    return Codebooks(assign.nearest(weight_NOI, S, codebook), codebook, A, B)


def alternate(codebooks: Codebooks, weight_NOI: Tensor, h_NI: Tensor) -> Codebooks:
    """One round: codebook, A, B, indices, each better under a diagonal importance given the others."""
    some, index, entries = sample(weight_NOI), codebooks.index_NOI, codebooks.codebook_NK.shape[1]
    linear = least_squares.codebook(index[:, some], codebooks.A_NOR[:, some] @ codebooks.B_NRI, h_NI, entries)
    codebook = least_squares.refit(codebooks.codebook_NK, linear, weight_NOI[:, some], h_NI)
    A, B = _scales(codebooks, codebook, weight_NOI, h_NI)
    codebook = codebook.sort(dim=1).values if codebook.dim() == 2 else codebook
    return Codebooks(_nearest(weight_NOI, A, B, codebook), codebook, A, B)


def _scales(codebooks: Codebooks, codebook_NK: Tensor, weight_NOI: Tensor, h_NI: Tensor) -> tuple[Tensor, Tensor]:
    """A, then B, under a new codebook."""
    B, parts = codebooks.B_NRI, list[Tensor]()
    pairs = least_squares.pairs(B)

    def fitted() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in lookup.together(weight_NOI):
            Q, weight = lookup.look_up(codebook_NK, codebooks.index_NOI[:, rows]), weight_NOI[:, rows]
            linear = least_squares.rows(Q, B, h_NI, pairs)
            parts.append(least_squares.refit(codebooks.A_NOR[:, rows], linear, weight, h_NI, RELAXATION))
            yield parts[-1], Q, weight

    B = least_squares.refit_columns(B, fitted(), h_NI, RELAXATION)
    return torch.cat(parts, 1), B


def _nearest(weight_NOI: Tensor, A_NOR: Tensor, B_NRI: Tensor, codebook_NK: Tensor) -> Tensor:
    """The nearest indices."""
    pieces = lookup.together(weight_NOI)
    return torch.cat([assign.nearest(weight_NOI[:, x], A_NOR[:, x] @ B_NRI, codebook_NK) for x in pieces], 1)


def further(codebooks: Codebooks, weight_NOI: Tensor, h_NI: Tensor) -> Codebooks:
    """Fits further rows under a given codebook and B: A by least squares from magnitudes, then the nearest indices."""
    codebook, B = codebooks.codebook_NK, codebooks.B_NRI
    typical = lookup.look_up(codebook, codebooks.index_NOI).abs().mean(dim=(1, 2), keepdim=True)
    ones = torch.ones_like(weight_NOI)
    A = least_squares.rows(ones, B, h_NI).solve((weight_NOI.abs() / typical * h_NI[:, None]) @ B.mT)
    return Codebooks(assign.nearest(weight_NOI, A @ B, codebook), codebook, A, B)


def alternate_rows(codebooks: Codebooks, weight_NOI: Tensor, h_NI: Tensor) -> Codebooks:
    """Like `alternate`, with codebook and B fixed."""
    codebook, B, Q = codebooks.codebook_NK, codebooks.B_NRI, lookup.look_up(codebooks.codebook_NK, codebooks.index_NOI)
    A = least_squares.refit(codebooks.A_NOR, least_squares.rows(Q, B, h_NI), weight_NOI, h_NI, RELAXATION)
    return Codebooks(assign.nearest(weight_NOI, A @ B, codebook), codebook, A, B)


def refine_rows(codebooks: Codebooks, weight_NOI: Tensor, cost: Curvature) -> Codebooks:
    """Like `refine`, with codebook and B fixed."""
    h_NI = cost.inputs_NII.diagonal(dim1=1, dim2=2)
    Q = lookup.look_up(codebooks.codebook_NK, codebooks.index_NOI)
    A = _descend(codebooks.A_NOR, least_squares.rows(Q, codebooks.B_NRI, h_NI), weight_NOI, cost)
    return Codebooks(codebooks.index_NOI, codebooks.codebook_NK, A, codebooks.B_NRI)


def sample(weight_NOI: Tensor) -> slice:
    """Evenly spaced outputs with about `SAMPLE` weights in each layer, or all outputs."""
    return slice(None, None, max(1, weight_NOI[0].numel() // SAMPLE))


def refine(codebooks: Codebooks, weight_NOI: Tensor, cost: Curvature) -> Codebooks:
    """A, B and the codebook under the whole curvature, indices fixed."""
    h_NI = cost.inputs_NII.diagonal(dim1=1, dim2=2)
    index, entries = codebooks.index_NOI, codebooks.codebook_NK.shape[1]
    Q = lookup.look_up(codebooks.codebook_NK, index)
    left = least_squares.Left(weight_NOI - Q * codebooks.scale(), cost)
    A = _descend(codebooks.A_NOR, least_squares.rows(Q, codebooks.B_NRI, h_NI), weight_NOI, cost, left)
    B = _descend(codebooks.B_NRI, least_squares.columns(Q, A, h_NI), weight_NOI, cost, left)
    linear = least_squares.codebook(index, A @ B, h_NI, entries)
    codebook = _descend(codebooks.codebook_NK, linear, weight_NOI, cost, left)
    return Codebooks(*_ascending(index, codebook), A, B)


def _descend(
    x: Tensor,
    linear: least_squares.Linear,
    weight_NOI: Tensor,
    cost: Curvature,
    left: least_squares.Left | None = None,
) -> Tensor:
    return least_squares.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS, least_squares.ENOUGH, left)


def _ascending(index_NOI: Tensor, codebook_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The same quantization with each codebook in ascending order; vectors have none."""
    if codebook_NK.dim() == 3:
        return index_NOI, codebook_NK
    codebook, order = codebook_NK.sort(dim=1)
    place = order.argsort(dim=1)
    if torch.equal(place, torch.arange(place.shape[1], device=place.device).expand_as(place)):
        return index_NOI, codebook
    return lookup.look_up(place, index_NOI).to(torch.uint8), codebook
