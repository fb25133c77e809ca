"""Fits codebooks with low-rank scales to stacks of layers of one shape; `qat.quant.fit` says in which order.

Under a diagonal importance codebook, A and B are each the least weighted squares given the others. A and B go
further than to their minimum (successive over-relaxation, Young 1954), by which the error falls faster. Under the
whole curvature they follow conjugate gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant import assign, least_squares, lookup
from qat.quant.curvature import Curvature
from qat.quant.formats.base import Cluster, Fitted

CG_ITERATIONS = 4
SAMPLE = 1 << 18  # weights of a layer that a round fits the table to; the first comes from all, as few may decide it
RELAXATION = 1.5  # of the way to the minimum; below 2 the error cannot rise
FARTHEST = 8.0  # root mean squares beyond which a relative weight says more about its scale than about the table


@dataclass(frozen=True)
class Tables:
    """Quantized layers: `W ≈ table[index] ⊙ (A @ B)`."""

    index_NOI: Tensor  # uint8
    table_NK: Tensor
    A_NOR: Tensor
    B_NRI: Tensor

    def scale(self) -> Tensor:
        """S [N, O, I]."""
        return self.A_NOR @ self.B_NRI

    def weight(self) -> Tensor:
        """The quantized weight [N, O, I]."""
        return lookup.look_up(self.table_NK, self.index_NOI) * self.scale()

    @staticmethod
    def of(fitted: Fitted) -> "Tables":
        """From what formats have in common."""
        return Tables(fitted.index_NOI, *(fitted.operands[name] for name in ("lut", "A", "B")))

    def fitted(self) -> Fitted:
        """To what formats have in common."""
        return Fitted(self.index_NOI, {"lut": self.table_NK, "A": self.A_NOR, "B": self.B_NRI})


def start(weight_NOI: Tensor, h_NI: Tensor, entries: int, rank: int, cluster: Cluster) -> Tables:
    """Scales from group means, then the best table for the weights relative to them."""
    A, B = least_squares.initial(weight_NOI, rank)
    S = A @ B
    x = lookup.relative(weight_NOI, S).flatten(1)
    matters = (S.square() * h_NI[:, None]).flatten(1)
    spread = (matters * x.square()).sum(1, keepdim=True).div_(matters.sum(1, keepdim=True).clamp_min_(1e-30)).sqrt_()
    table = cluster(x.clamp(-FARTHEST * spread, FARTHEST * spread), matters, entries)
    return Tables(assign.nearest(weight_NOI, S, table), table, A, B)


def alternate(tables: Tables, weight_NOI: Tensor, h_NI: Tensor) -> Tables:
    """One round: table, A, B, indices, each better under a diagonal importance given the others."""
    some, index = sample(weight_NOI), tables.index_NOI
    linear = least_squares.table(index[:, some], tables.A_NOR[:, some] @ tables.B_NRI, h_NI, tables.table_NK.shape[1])
    table = least_squares.refit(tables.table_NK, linear, weight_NOI[:, some], h_NI)
    Q = lookup.look_up(table, index)
    A = least_squares.refit(tables.A_NOR, least_squares.rows(Q, tables.B_NRI, h_NI), weight_NOI, h_NI, RELAXATION)
    B = least_squares.refit(tables.B_NRI, least_squares.columns(Q, A, h_NI), weight_NOI, h_NI, RELAXATION)
    table = table.sort(dim=1).values
    return Tables(assign.nearest(weight_NOI, A @ B, table), table, A, B)


def further(tables: Tables, weight_NOI: Tensor, h_NI: Tensor) -> Tables:
    """Further rows for fitted ones' table and B: A by least squares from magnitudes, then the nearest indices."""
    table, B = tables.table_NK, tables.B_NRI
    typical = lookup.look_up(table, tables.index_NOI).abs().mean(dim=(1, 2), keepdim=True)
    ones = torch.ones_like(weight_NOI)
    A = least_squares.rows(ones, B, h_NI).solve((weight_NOI.abs() / typical * h_NI[:, None]) @ B.mT)
    return Tables(assign.nearest(weight_NOI, A @ B, table), table, A, B)


def alternate_rows(tables: Tables, weight_NOI: Tensor, h_NI: Tensor) -> Tables:
    """As `alternate`, with table and B as they are."""
    table, B, Q = tables.table_NK, tables.B_NRI, lookup.look_up(tables.table_NK, tables.index_NOI)
    A = least_squares.refit(tables.A_NOR, least_squares.rows(Q, B, h_NI), weight_NOI, h_NI, RELAXATION)
    return Tables(assign.nearest(weight_NOI, A @ B, table), table, A, B)


def refine_rows(tables: Tables, weight_NOI: Tensor, cost: Curvature) -> Tables:
    """As `refine`, with table and B as they are."""
    h_NI = cost.inputs_NII.diagonal(dim1=1, dim2=2)
    Q = lookup.look_up(tables.table_NK, tables.index_NOI)
    A = _descend(tables.A_NOR, least_squares.rows(Q, tables.B_NRI, h_NI), weight_NOI, cost)
    return Tables(tables.index_NOI, tables.table_NK, A, tables.B_NRI)


def sample(weight_NOI: Tensor) -> slice:
    """Evenly spread outputs with about `SAMPLE` weights in each layer, or all."""
    return slice(None, None, max(1, weight_NOI[0].numel() // SAMPLE))


def refine(tables: Tables, weight_NOI: Tensor, cost: Curvature) -> Tables:
    """A, B and the table under the whole curvature, indices fixed."""
    h_NI = cost.inputs_NII.diagonal(dim1=1, dim2=2)
    index, entries = tables.index_NOI, tables.table_NK.shape[1]
    Q = lookup.look_up(tables.table_NK, index)
    A = _descend(tables.A_NOR, least_squares.rows(Q, tables.B_NRI, h_NI), weight_NOI, cost)
    B = _descend(tables.B_NRI, least_squares.columns(Q, A, h_NI), weight_NOI, cost)
    table = _descend(tables.table_NK, least_squares.table(index, A @ B, h_NI, entries), weight_NOI, cost)
    return Tables(*_ascending(index, table), A, B)


def _descend(x: Tensor, linear: least_squares.Linear, weight_NOI: Tensor, cost: Curvature) -> Tensor:
    return least_squares.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS)


def _ascending(index_NOI: Tensor, table_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The same quantization with each table in ascending order."""
    table, order = table_NK.sort(dim=1)
    place = order.argsort(dim=1)
    if torch.equal(place, torch.arange(place.shape[1], device=place.device).expand_as(place)):
        return index_NOI, table
    return lookup.look_up(place, index_NOI).to(torch.uint8), table
