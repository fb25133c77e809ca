"""Fits one stack of layers of the same shape: table, indices and scales, from weights and second moments.

Three steps. *Alternate*: indices nearest to the grid, then table, A and B, each the least weighted
squares given the others, the weights being the diagonal of the layer inputs' second moment H.
*Assign*: the indices again, with error compensation under the whole of H. *Refine*: A, B and the table
under the whole of H, by conjugate gradients; then sweeps of coordinate descent over the indices, each
followed by a refinement. From the assignment on, the layer's output error never rises.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.quant import assign, scales

Cluster = Callable[[Tensor, Tensor, int], Tensor]

CG_ITERATIONS = 4
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
        return scales.look_up(self.table_NK, self.index_NOI) * self.scale()


def fit(
    weight_NOI: Tensor,
    H_NII: Tensor,
    factor: assign.Factor,
    bits: int,
    rank: int,
    cluster: Cluster,
    rounds: int,
    sweeps: int,
) -> Tables:
    """Quantizes N layers of one shape.

    Args:
        weight_NOI: fp32 weights.
        H_NII: fp32 second moment of each layer's inputs.
        factor: of the same second moments.
        bits: a table has 2**bits entries.
        rank: of the scales.
        cluster: makes the first table from relative weights [N, M] and their importance.
        rounds: alternations before the assignment.
        sweeps: of coordinate descent over the indices after it, each with a refinement.
    """
    h_NI = importance(H_NII)
    tables = start(weight_NOI, h_NI, 2**bits, rank, cluster)
    for _ in range(rounds):
        tables = alternate(tables, weight_NOI, h_NI)
    damped = assign.damp(H_NII)
    index = assign.compensated(weight_NOI, tables.scale(), tables.table_NK, factor)
    tables = refine(replace(tables, index_NOI=index), weight_NOI, damped)
    for _ in range(sweeps):
        index = assign.descended(weight_NOI, tables.scale(), tables.table_NK, damped, tables.index_NOI)
        tables = refine(replace(tables, index_NOI=index), weight_NOI, damped)
    return tables


def importance(H_NII: Tensor) -> Tensor:
    """The diagonal [N, I], kept within a factor of 100 of its mean."""
    h_NI = H_NII.diagonal(dim1=1, dim2=2)
    mean = h_NI.mean(1, keepdim=True).clamp_min(1e-10)
    return torch.clamp(h_NI / mean, 0.01, 100.0)


def start(weight_NOI: Tensor, h_NI: Tensor, entries: int, rank: int, cluster: Cluster) -> Tables:
    """Scales from group means, then the best table for the weights relative to them."""
    A, B = scales.initial(weight_NOI, rank)
    S = A @ B
    x = assign.relative(weight_NOI, S).flatten(1)
    matters = (S.square() * h_NI[:, None]).flatten(1)
    spread = (matters * x.square()).sum(1, keepdim=True).div_(matters.sum(1, keepdim=True).clamp_min_(1e-30)).sqrt_()
    table = cluster(x.clamp(-FARTHEST * spread, FARTHEST * spread), matters, entries)
    return Tables(assign.nearest(weight_NOI, S, table), table, A, B)


def alternate(tables: Tables, weight_NOI: Tensor, h_NI: Tensor) -> Tables:
    """One round: indices, table, A, B, each the best under a diagonal importance given the others."""
    S = tables.scale()
    index = assign.nearest(weight_NOI, S, tables.table_NK)
    entries = tables.table_NK.shape[1]
    table = scales.refit(tables.table_NK, scales.table(index, S, h_NI, entries), weight_NOI, h_NI)
    Q = scales.look_up(table, index)
    A = scales.refit(tables.A_NOR, scales.rows(Q, tables.B_NRI, h_NI), weight_NOI, h_NI)
    B = scales.refit(tables.B_NRI, scales.columns(Q, A, h_NI), weight_NOI, h_NI)
    return Tables(*_ascending(index, table), A, B)


def refine(tables: Tables, weight_NOI: Tensor, H_NII: Tensor) -> Tables:
    """A, B and the table under the whole second moment, indices fixed."""
    h_NI = H_NII.diagonal(dim1=1, dim2=2)
    index, entries = tables.index_NOI, tables.table_NK.shape[1]
    Q = scales.look_up(tables.table_NK, index)
    A = _descend(tables.A_NOR, scales.rows(Q, tables.B_NRI, h_NI), weight_NOI, H_NII)
    B = _descend(tables.B_NRI, scales.columns(Q, A, h_NI), weight_NOI, H_NII)
    table = _descend(tables.table_NK, scales.table(index, A @ B, h_NI, entries), weight_NOI, H_NII)
    return Tables(*_ascending(index, table), A, B)


def _descend(x: Tensor, linear: scales.Linear, weight_NOI: Tensor, H_NII: Tensor) -> Tensor:
    return scales.conjugate_gradient(x, linear, weight_NOI, H_NII, CG_ITERATIONS)


def _ascending(index_NOI: Tensor, table_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The same quantization with each table in ascending order."""
    table, order = table_NK.sort(dim=1)
    place = order.argsort(dim=1)
    if torch.equal(place, torch.arange(place.shape[1], device=place.device).expand_as(place)):
        return index_NOI, table
    return scales.look_up(place, index_NOI).to(torch.uint8), table
