"""Fits one stack of layers of the same shape: table, indices and scales, from weights and curvature.

Three steps. *Alternate*: table, A and B by least weighted squares, each given the others, then the indices
nearest to the grid, the weights being the diagonal of the layer inputs' second moment. A and B go further
than to their minimum (successive over-relaxation, Young 1954), by which the error falls faster.
*Assign*: the indices again, with error compensation under the whole second moment. *Descend*: A, B and the
table under the whole curvature, inputs and outputs, by conjugate gradients; then sweeps of coordinate
descent over the indices, each followed by such a refinement. In this last step the cost never rises.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.quant import assign, codebook, curvature, scales
from qat.quant.curvature import Curvature, Factor

Cluster = Callable[[Tensor, Tensor, int], Tensor]

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
        return scales.look_up(self.table_NK, self.index_NOI) * self.scale()


class Problem:
    """N layers of one shape and what errors in them cost.

    Rows are multiplied by the root of their outputs' curvature, so that every row of `weight_NOI` counts
    alike; scaling the rows of A back gives tables of the layer itself.
    """

    def __init__(self, weight_NOI: Tensor, H_NII: Tensor, factor: Factor, G_NOO: Tensor | None = None) -> None:
        """States the problem.

        Args:
            weight_NOI: fp32 weights.
            H_NII: fp32 second moment of each layer's inputs.
            factor: of the same second moments.
            G_NOO: fp32 second moment of the gradients at its outputs; None counts every output alike.
        """
        self.row_NO: Tensor | None = None
        coupling = None
        if G_NOO is not None:
            coupling, self.row_NO = curvature.normalized(G_NOO)
        self.weight_NOI = self._scaled(weight_NOI)
        self.curvature = Curvature(curvature.damp(H_NII), coupling)
        self.importance_NI = importance(H_NII)
        self.factor = factor

    def enter(self, tables: Tables) -> Tables:
        """Tables of the layers as tables of the scaled rows."""
        return replace(tables, A_NOR=self._scaled(tables.A_NOR))

    def leave(self, tables: Tables) -> Tables:
        """Tables of the scaled rows as tables of the layers."""
        return tables if self.row_NO is None else replace(tables, A_NOR=tables.A_NOR / self.row_NO[:, :, None])

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.row_NO is None else rows * self.row_NO[:, :, None]


def fit(problem: Problem, bits: int, rank: int, cluster: Cluster, rounds: int, sweeps: int) -> Tables:
    """Quantizes the layers of a problem.

    Args:
        problem: weights and curvature.
        bits: a table has 2**bits entries.
        rank: of the scales.
        cluster: makes the first table from relative weights [N, M] and their importance.
        rounds: alternations before the assignment.
        sweeps: of coordinate descent over the indices after it, each with a refinement.
    """
    weight, h = problem.weight_NOI, problem.importance_NI
    tables = start(weight, h, 2**bits, rank, cluster)
    for _ in range(rounds):
        tables = alternate(tables, weight, h)
    return improve(problem, problem.leave(tables), sweeps)


def improve(problem: Problem, tables: Tables, sweeps: int) -> Tables:
    """Assigns the indices of given tables anew and descends from there; see `fit`."""
    weight, cost = problem.weight_NOI, problem.curvature
    tables = problem.enter(tables)
    index = assign.compensated(weight, tables.scale(), tables.table_NK, problem.factor)
    tables = refine(replace(tables, index_NOI=index), weight, cost)
    for _ in range(sweeps):
        index = assign.descended(weight, tables.scale(), tables.table_NK, cost, tables.index_NOI)
        tables = refine(replace(tables, index_NOI=index), weight, cost)
    return problem.leave(tables)


def importance(H_NII: Tensor) -> Tensor:
    """The diagonal [N, I], kept within a factor of 100 of its mean."""
    h_NI = H_NII.diagonal(dim1=1, dim2=2)
    mean = h_NI.mean(1, keepdim=True).clamp_min(1e-10)
    return torch.clamp(h_NI / mean, 0.01, 100.0)


def start(weight_NOI: Tensor, h_NI: Tensor, entries: int, rank: int, cluster: Cluster) -> Tables:
    """Scales from group means, then the best table for the weights relative to them."""
    A, B = scales.initial(weight_NOI, rank)
    S = A @ B
    x = codebook.relative(weight_NOI, S).flatten(1)
    matters = (S.square() * h_NI[:, None]).flatten(1)
    spread = (matters * x.square()).sum(1, keepdim=True).div_(matters.sum(1, keepdim=True).clamp_min_(1e-30)).sqrt_()
    table = cluster(x.clamp(-FARTHEST * spread, FARTHEST * spread), matters, entries)
    return Tables(assign.nearest(weight_NOI, S, table), table, A, B)


def alternate(tables: Tables, weight_NOI: Tensor, h_NI: Tensor) -> Tables:
    """One round: table, A, B, indices, each better under a diagonal importance given the others."""
    some, index = sample(weight_NOI), tables.index_NOI
    linear = scales.table(index[:, some], tables.A_NOR[:, some] @ tables.B_NRI, h_NI, tables.table_NK.shape[1])
    table = scales.refit(tables.table_NK, linear, weight_NOI[:, some], h_NI)
    Q = scales.look_up(table, index)
    A = scales.refit(tables.A_NOR, scales.rows(Q, tables.B_NRI, h_NI), weight_NOI, h_NI, RELAXATION)
    B = scales.refit(tables.B_NRI, scales.columns(Q, A, h_NI), weight_NOI, h_NI, RELAXATION)
    table = table.sort(dim=1).values
    return Tables(assign.nearest(weight_NOI, A @ B, table), table, A, B)


def sample(weight_NOI: Tensor) -> slice:
    """Evenly spread outputs with about `SAMPLE` weights in each layer, or all."""
    return slice(None, None, max(1, weight_NOI[0].numel() // SAMPLE))


def refine(tables: Tables, weight_NOI: Tensor, cost: Curvature) -> Tables:
    """A, B and the table under the whole curvature, indices fixed."""
    h_NI = cost.inputs_NII.diagonal(dim1=1, dim2=2)
    index, entries = tables.index_NOI, tables.table_NK.shape[1]
    Q = scales.look_up(tables.table_NK, index)
    A = _descend(tables.A_NOR, scales.rows(Q, tables.B_NRI, h_NI), weight_NOI, cost)
    B = _descend(tables.B_NRI, scales.columns(Q, A, h_NI), weight_NOI, cost)
    table = _descend(tables.table_NK, scales.table(index, A @ B, h_NI, entries), weight_NOI, cost)
    return Tables(*_ascending(index, table), A, B)


def _descend(x: Tensor, linear: scales.Linear, weight_NOI: Tensor, cost: Curvature) -> Tensor:
    return scales.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS)


def _ascending(index_NOI: Tensor, table_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The same quantization with each table in ascending order."""
    table, order = table_NK.sort(dim=1)
    place = order.argsort(dim=1)
    if torch.equal(place, torch.arange(place.shape[1], device=place.device).expand_as(place)):
        return index_NOI, table
    return scales.look_up(place, index_NOI).to(torch.uint8), table
