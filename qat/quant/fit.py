"""Fits one stack of layers of the same shape: indices and the parts of its format, from weights and curvature.

Three steps. *Alternate*: what a format has besides indices by least weighted squares, then the indices nearest to
its grid, the weights being the diagonal of the layer inputs' second moment. *Assign*: the indices again, with error
compensation under the whole second moment. *Descend*: the rest under the whole curvature, inputs and outputs, by
conjugate gradients; then sweeps of coordinate descent over the indices, each followed by such a refinement. In this
last step the cost never rises.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.quant import assign, curvature
from qat.quant.curvature import Curvature, Factor
from qat.quant.formats import Cluster, Fitted, Format


class Problem:
    """N layers of one shape and what errors in them cost.

    Rows are multiplied by the root of their outputs' curvature, so that every row of `weight_NOI` counts
    alike; dividing what rows are proportional to gives the layer itself.
    """

    def __init__(
        self,
        weight_NOI: Tensor,
        H_NII: Tensor,
        factor: Factor,
        G_NOO: Tensor | None = None,
        matters_NO: Tensor | None = None,
    ) -> None:
        """States the problem.

        Args:
            weight_NOI: fp32 weights.
            H_NII: fp32 second moment of each layer's inputs.
            factor: of the same second moments.
            G_NOO: fp32 second moment of the gradients at its outputs; None counts every output alike.
            matters_NO: instead, how much each output counts by itself.
        """
        self.row_NO = None if matters_NO is None else matters_NO.sqrt()
        coupling = None
        if G_NOO is not None:
            coupling, self.row_NO = curvature.normalized(G_NOO)
        self.weight_NOI = self._scaled(weight_NOI)
        self.curvature = Curvature(curvature.damp(H_NII), coupling)
        self.importance_NI = importance(H_NII)
        self.factor = factor

    def enter(self, format: Format, fitted: Fitted) -> Fitted:
        """Converts quantized layers to those of the scaled rows."""
        return self._with_rows(format, fitted, self._scaled)

    def leave(self, format: Format, fitted: Fitted) -> Fitted:
        """Converts fitted layers of the scaled rows back to the original scale."""
        row_NO = self.row_NO
        return fitted if row_NO is None else self._with_rows(format, fitted, lambda x: x / row_NO[:, :, None])

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.row_NO is None else rows * self.row_NO[:, :, None]

    @staticmethod
    def _with_rows(format: Format, fitted: Fitted, change: Callable[[Tensor], Tensor]) -> Fitted:
        changed = {name: change(fitted.operands[name]) for name in format.scaled}
        return Fitted(fitted.index_NOI, fitted.operands | changed)


def fit(
    problem: Problem, format: Format, cluster: Cluster, rounds: int, sweeps: int, known: Fitted | None = None
) -> Fitted:
    """Quantizes the layers of a problem.

    Args:
        problem: weights and curvature.
        format: what to quantize them to.
        cluster: makes the first codebooks, where the format learns them, from relative weights and their importance.
        rounds: alternations before the assignment.
        sweeps: of coordinate descent over the indices after it, each with a refinement.
        known: other rows of the same layers, fitted before, whose operands stay where rows share them.
    """
    weight, h, shared = problem.weight_NOI, problem.importance_NI, known is None
    fitted = format.start(weight, h, cluster) if known is None else format.continued(known, weight, h, cluster)
    for _ in range(rounds):
        fitted = format.alternated(fitted, weight, h, shared)
    return improve(problem, format, problem.leave(format, fitted), sweeps, shared)


def improve(problem: Problem, format: Format, fitted: Fitted, sweeps: int, shared: bool = True) -> Fitted:
    """Assigns the indices of quantized layers again and continues with `fit`'s last step.

    Without `shared`, operands that other rows have too stay as they are.
    """
    weight, cost = problem.weight_NOI, problem.curvature
    fitted = problem.enter(format, fitted)
    grid = format.grid(fitted.operands)
    index = assign.compensated(grid.unshifted(weight), grid.scale_NOI, grid.values_NK, problem.factor)
    fitted = format.refined(Fitted(index, fitted.operands), weight, cost, shared)
    for _ in range(sweeps):
        grid = format.grid(fitted.operands)
        wanted = grid.unshifted(weight)
        index = assign.descended(wanted, grid.scale_NOI, grid.values_NK, cost, fitted.index_NOI)
        fitted = format.refined(Fitted(index, fitted.operands), weight, cost, shared)
    return problem.leave(format, fitted)


def importance(H_NII: Tensor) -> Tensor:
    """The diagonal [N, I], kept within a factor of 100 of its mean."""
    h_NI = H_NII.diagonal(dim1=1, dim2=2)
    mean = h_NI.mean(1, keepdim=True).clamp_min(1e-10)
    return torch.clamp(h_NI / mean, 0.01, 100.0)
