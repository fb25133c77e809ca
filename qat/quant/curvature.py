"""The cost of an error in a weight: the loss's second derivative, as a Kronecker product of two small matrices.

Over calibration text let x be a layer's inputs and g the gradient of the loss at its outputs, for next
tokens drawn from the model itself. Then the expected KL that an error E adds is, to second order,
`½ E[(gᵀ E x)²]`, whose Kronecker approximation (Martens & Grosse 2015, "K-FAC"; as a rounding objective:
Tseng et al. 2025, "YAQA", arXiv 2505.22988) is `tr(G E H Eᵀ)` with H = E[x xᵀ] and G = E[g gᵀ]. Without G
every output counts alike and independently, and the cost is the squared error of the layer's output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant.lookup import together

INPUT_DAMPING = 0.01  # damping of H, relative to its mean diagonal
INVERTED = 256  # rows of a triangular matrix that is inverted at once
COLUMNS = 256  # of an error whose cost is computed together
OUTPUT_DAMPING = 0.1  # damping of G, relative to its mean diagonal; larger, as G comes from fewer independent samples


@dataclass(frozen=True)
class Curvature:
    """Cost of errors [N, O, I] of N layers of one shape.

    Attributes:
        inputs_NII: H, positive definite.
        outputs_NOO: G with a unit diagonal; None is the identity.
    """

    inputs_NII: Tensor
    outputs_NOO: Tensor | None = None

    def slope(self, error_NOI: Tensor) -> Tensor:
        """`G E H` [N, O, I], half the gradient of the cost."""
        mixed = error_NOI if self.outputs_NOO is None else self.outputs_NOO @ error_NOI
        return mixed @ self.inputs_NII

    def cost(self, error_NOI: Tensor) -> Tensor:
        """`tr(G E H Eᵀ)` [N]."""
        if self.outputs_NOO is not None:
            return (self.slope(error_NOI) * error_NOI).sum(dim=(1, 2))
        return torch.stack([self._separately(error_NOI[:, rows]) for rows in together(error_NOI)]).sum(0)

    def _separately(self, error_NXI: Tensor) -> Tensor:
        """The cost [N] of rows that nothing couples; what H has below its diagonal counts as what it has above."""
        cost_N = error_NXI.new_zeros(len(error_NXI))
        for begin in range(0, error_NXI.shape[2], COLUMNS):
            here, on = slice(begin, begin + COLUMNS), slice(begin, None)
            share_NXI = (error_NXI[:, :, here] @ self.inputs_NII[:, here, on]).mul_(error_NXI[:, :, on])
            cost_N += 2 * share_NXI.sum(dim=(1, 2)) - share_NXI[:, :, :COLUMNS].sum(dim=(1, 2))
        return cost_N


def damp(moment_NXX: Tensor, share: float = INPUT_DAMPING) -> Tensor:
    """The matrix with a share of its mean diagonal added, so that directions without samples have a cost too."""
    mean = moment_NXX.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-10)
    one_XX = torch.eye(moment_NXX.shape[1], dtype=moment_NXX.dtype, device=moment_NXX.device)
    return moment_NXX + share * mean[:, None, None] * one_XX


def normalized(G_NOO: Tensor) -> tuple[Tensor, Tensor]:
    """G, damped and scaled to a unit diagonal [N, O, O], and the factors of rows [N, O] for that."""
    damped = damp(G_NOO, OUTPUT_DAMPING)
    row_NO = damped.diagonal(dim1=1, dim2=2).sqrt()
    row_NO = row_NO / row_NO.square().mean(1, keepdim=True).sqrt()
    scale = damped.diagonal(dim1=1, dim2=2).rsqrt()
    return damped * scale[:, :, None] * scale[:, None, :], row_NO


class Factor:
    """What error compensation needs of a second moment; computed once for all layers that share an input.

    Columns that share an index are chosen at once and make up a *block*; else a block is a column.

    Attributes:
        order_NI: columns, by decreasing diagonal of their blocks.
        spread_NII: columns in that order; row j says how much of the error made in column j the columns of each later
            block take over: with the inverse's upper Cholesky factor U, the rows of a block are `-U_bb⁻¹ U_b`.
        metric_NBDD: of each block in that order, what errors in it cost once later columns have made up for them as
            far as they can: `(U_bbᵀ U_bb)⁻¹`.
    """

    def __init__(self, order_NI: Tensor, spread_NII: Tensor, metric_NBDD: Tensor) -> None:
        self.order_NI, self.spread_NII, self.metric_NBDD = order_NI, spread_NII, metric_NBDD

    @staticmethod
    def of(H_NII: Tensor, dim: int = 1) -> "Factor":
        """Factorises H, damped, in full fp32; `dim` adjacent columns share an index."""
        made = damp(H_NII)  # one name for every step: of wide layers, more than two of these matrices are gigabytes
        diagonal = made.diagonal(dim1=1, dim2=2).unflatten(1, (-1, dim)).sum(2)
        first = diagonal.argsort(dim=1, descending=True) * dim
        order = (first[:, :, None] + torch.arange(dim, device=first.device)).flatten(1)
        # The inverse's factor is R⁻¹ where H = R Rᵀ and R is upper triangular: Cholesky's own from the last row up
        backwards = order.flip(1)
        made = made.gather(1, backwards[:, :, None].expand_as(made))
        made = made.gather(2, backwards[:, None, :].expand_as(made))
        made = torch.linalg.cholesky(made)
        made = made.flip(1, 2)
        upper = invert_upper(made)
        corner_NBDD = blocks(upper, dim)
        if dim == 1:
            metric = corner_NBDD.square().reciprocal_()
            return Factor(order, upper.div_(-corner_NBDD[..., 0]), metric)
        inverse_NBDD = torch.linalg.inv(corner_NBDD)
        spread = (inverse_NBDD @ upper.unflatten(1, (-1, dim))).flatten(1, 2).neg_()
        return Factor(order, spread, inverse_NBDD @ inverse_NBDD.mT)

    @staticmethod
    def join(factors: list["Factor"]) -> "Factor":
        """Joins the factors of single layers into one of several layers."""
        if len(factors) == 1:
            return factors[0]
        parts = [(factor.order_NI, factor.spread_NII, factor.metric_NBDD) for factor in factors]
        return Factor(*(torch.cat(part) for part in zip(*parts, strict=True)))


def invert_upper(matrix_NII: Tensor) -> Tensor:
    """Inverts upper triangular matrices in place: halves of them, and what lies between these by two products."""
    size = matrix_NII.shape[1]
    if size <= INVERTED:
        one = torch.eye(size, dtype=matrix_NII.dtype, device=matrix_NII.device)
        return matrix_NII.copy_(torch.linalg.solve_triangular(matrix_NII, one.expand_as(matrix_NII), upper=True))
    first, last = slice(None, size // 2), slice(size // 2, None)
    top, bottom = invert_upper(matrix_NII[:, first, first]), invert_upper(matrix_NII[:, last, last])
    between = matrix_NII[:, first, last]
    between.copy_(top @ (between @ bottom)).neg_()
    return matrix_NII


def blocks(matrix_NII: Tensor, dim: int) -> Tensor:
    """The blocks [N, B, D, D] of D adjacent rows and columns on the diagonal."""
    cut = matrix_NII.unflatten(2, (-1, dim)).unflatten(1, (-1, dim))
    return cut.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
