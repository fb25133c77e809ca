"""Low-rank scales `S = A @ B`, fitted to the error that matters rather than to the size of weights.

With the indices and the codebook fixed, `W ≈ Q ⊙ (A @ B)` is linear in A and linear in B. Under a diagonal
importance each row of A and each column of B has its own R × R weighted normal equations. Under the
full curvature (see `curvature`) conjugate gradients (Hestenes & Stiefel 1952) solve for A, B or the codebook without
ever forming the equations: one product with H an iteration instead of R of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant.curvature import Curvature
from qat.quant.lookup import entry_sums, look_up

SOLVED = 1e-10  # squared residual, relative to the first, at which conjugate gradients stop: the limit of fp32
ENOUGH = 5e-4  # a share of the cost: formats do without an iteration that is expected to lower it by less
DAMPING = 1e-3  # damping towards the previous value, relative to the mean diagonal: unused directions keep their value


def initial(weight_NOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [N, O, R] and B [N, R, I] of twice the mean magnitude of each row over groups of inputs.

    The map of group means has few columns, so its rank-R part needs only a small decomposition.
    """
    inputs = weight_NOI.shape[2]
    groups = min(inputs, max(rank, -(-inputs // 64)))
    means = torch.nn.functional.adaptive_avg_pool1d(weight_NOI.abs(), groups) * 2
    spread = torch.zeros(groups, inputs, dtype=torch.float32, device=weight_NOI.device)
    column = torch.arange(inputs, device=weight_NOI.device)
    spread[(column * groups) // inputs, column] = 1.0
    if groups == rank:
        return means, spread.expand(len(means), -1, -1).contiguous()
    if groups < rank:  # fewer groups of inputs than ranks: the remaining ranks start unused
        idle = rank - groups
        A_NOR = torch.nn.functional.pad(means, (0, idle))
        return A_NOR, torch.nn.functional.pad(spread, (0, 0, 0, idle)).expand(len(means), -1, -1).contiguous()
    u, s, v = torch.linalg.svd(means, full_matrices=False)
    return u[..., :rank] * s[:, None, :rank], v[:, :rank] @ spread


@dataclass(frozen=True)
class Linear:
    """A linear map from unknowns to the quantized weight.

    Attributes:
        expand: unknowns to quantized weight [N, O, I].
        reduce: its adjoint, an error [N, O, I] to unknowns.
        solve: the normal equations under a diagonal importance, many small systems at once.
        coupled: dimensions of the unknowns that a full second moment of the inputs couples into one system;
            a curvature of the outputs couples all.
    """

    expand: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor], Tensor]
    coupled: tuple[int, ...]


def rows(Q_NOI: Tensor, B_NRI: Tensor, h_NI: Tensor, pairs_NPI: Tensor | None = None) -> Linear:
    """The quantized weight as a function of A; every row is a system of its own. `pairs_NPI` are those of B."""
    importance_NOI = Q_NOI.square().mul_(h_NI[:, None])
    pairs_NPI = pairs(B_NRI) if pairs_NPI is None else pairs_NPI
    solve = solver(_symmetric(importance_NOI @ pairs_NPI.mT, B_NRI.shape[1]))
    return Linear(lambda A: (A @ B_NRI).mul_(Q_NOI), lambda E: (E * Q_NOI) @ B_NRI.mT, solve, (2,))


def columns(Q_NOI: Tensor, A_NOR: Tensor, h_NI: Tensor) -> Linear:
    """The quantized weight as a function of B; a full second moment couples all of its columns."""
    importance_NOI = Q_NOI.square().mul_(h_NI[:, None])
    solve = solver(_symmetric((pairs(A_NOR.mT) @ importance_NOI).mT, A_NOR.shape[2]))
    return Linear(
        lambda B: (A_NOR @ B).mul_(Q_NOI),
        lambda E: A_NOR.mT @ (E * Q_NOI),
        lambda r: solve(r.mT).mT.contiguous(),
        (1, 2),
    )


def codebook(index_NOI: Tensor, S_NOI: Tensor, h_NI: Tensor, entries: int) -> Linear:
    """The quantized weight as a function of the codebook; an entry that no index uses stays as it is."""
    used_NK = entry_sums(S_NOI.square().mul_(h_NI[:, None]), index_NOI, entries)
    return Linear(
        lambda t: look_up(t, index_NOI).mul_(S_NOI),
        lambda E: entry_sums(E * S_NOI, index_NOI, entries),
        lambda r: torch.where(used_NK > 0, r / used_NK.clamp_min(1e-30), 0.0),
        tuple(range(1, used_NK.dim())),
    )


def pairs(factor_NRY: Tensor) -> Tensor:
    """Products [N, P, Y] of all pairs of rows r ≥ s; weighted sums of them give `factor factorᵀ`."""
    i, j = torch.tril_indices(factor_NRY.shape[1], factor_NRY.shape[1], device=factor_NRY.device)
    factor_NRY = factor_NRY.contiguous()
    return factor_NRY[:, i] * factor_NRY[:, j]


def _symmetric(sum_NXP: Tensor, rank: int) -> Tensor:
    """Symmetric matrices [N, X, R, R] from sums over pairs of rows."""
    i, j = torch.tril_indices(rank, rank, device=sum_NXP.device)
    pair_RR = torch.empty(rank, rank, dtype=torch.long, device=i.device)
    pair_RR[i, j] = pair_RR[j, i] = torch.arange(len(i), device=i.device)
    return sum_NXP.flatten(0, 1).index_select(1, pair_RR.flatten()).view(*sum_NXP.shape[:2], rank, rank)


def solver(gram_NXRR: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that solves many R × R systems; the matrices are damped in place."""
    diagonal_NXR = gram_NXRR.diagonal(dim1=-2, dim2=-1)
    diagonal_NXR.add_(DAMPING * diagonal_NXR.mean(-1, keepdim=True).clamp_min(1e-20))
    factor, failed = torch.linalg.cholesky_ex(gram_NXRR)
    healthy = (failed == 0)[..., None]
    return lambda right: torch.where(healthy, torch.cholesky_solve(right[..., None], factor)[..., 0], 0.0)


def refit(x: Tensor, linear: Linear, weight_NOI: Tensor, h_NI: Tensor, relaxation: float = 1.0) -> Tensor:
    """The unknowns with the smallest `Σ h (W − expand(x))²`, damped towards the given ones.

    A relaxation below 1 goes a part of that way, one above 1 beyond; up to 2 the sum does not rise.
    """
    error_NOI = linear.expand(x).sub_(weight_NOI).mul_(h_NI[:, None])
    return x - relaxation * linear.solve(linear.reduce(error_NOI))


class Left:
    """What errors [N, O, I] of some layers cost, and its slope; both follow the unknowns as they are fitted.

    So unknowns that are fitted after others need no product with H to begin with.
    """

    def __init__(self, error_NOI: Tensor, curvature: Curvature) -> None:
        self.slope_NOI = curvature.slope(error_NOI)
        self.cost_N = (self.slope_NOI * error_NOI).sum(dim=(1, 2))

    def lower(self, length: Tensor, curved_NOI: Tensor, gain: Tensor) -> None:
        """Takes a step of this length, relative to one of slope `curved_NOI`, which is used up."""
        self.slope_NOI -= curved_NOI.mul_(length.view(len(length), -1, 1))
        self.cost_N = self.cost_N - (length * gain).flatten(1).sum(1)


def conjugate_gradient(
    x: Tensor,
    linear: Linear,
    weight_NOI: Tensor,
    curvature: Curvature,
    iterations: int,
    enough: float = 0.0,
    left: Left | None = None,
) -> Tensor:
    """Lowers the cost of `W − expand(x)` from the given unknowns; it never rises.

    Preconditioned by the same problem under a diagonal importance, whose solution is at hand. By what that promises a
    CPU stops where an iteration is not expected to lower any layer's cost by more than a share `enough` of it; a GPU
    would have to wait to see it.

    Args:
        x: unknowns.
        linear: how the weight depends on them.
        weight_NOI: W.
        curvature: of the cost.
        iterations: at most.
        enough: see above.
        left: of the error at the given unknowns; follows them. None computes it.
    """
    coupled = linear.coupled if curvature.outputs_NOO is None else tuple(range(1, x.dim()))
    left = left or Left(weight_NOI - linear.expand(x), curvature)
    residual = linear.reduce(left.slope_NOI)
    direction = step = linear.solve(residual)
    gain = _dot(residual, step, coupled)
    solved = SOLVED * gain  # below this the residual is only rounding error, which further steps must not follow
    for _ in range(iterations):
        if enough and gain.device.type == "cpu" and bool((gain.flatten(1).sum(1) <= enough * left.cost_N).all()):
            break
        curved_NOI = curvature.slope(linear.expand(direction))
        curved = linear.reduce(curved_NOI)
        length = _ratio(gain * (gain > solved), _dot(direction, curved, coupled))
        x = x + length * direction
        residual = residual - length * curved
        left.lower(length, curved_NOI, gain)
        step = linear.solve(residual)
        before, gain = gain, _dot(residual, step, coupled)
        direction = step + _ratio(gain, before) * direction
    return x


def refit_columns(
    B_NRI: Tensor, parts: Iterable[tuple[Tensor, Tensor, Tensor]], h_NI: Tensor, relaxation: float = 1.0
) -> Tensor:
    """As `refit` for B, from A [N, X, R], Q [N, X, I] and W [N, X, I] of some rows after the others.

    What is computed of some rows stays in a CPU's caches.
    """
    rank, right_NRI = B_NRI.shape[1], torch.zeros_like(B_NRI)
    gram_NPI = B_NRI.new_zeros(len(B_NRI), rank * (rank + 1) // 2, B_NRI.shape[2])
    for A_NXR, Q_NXI, weight_NXI in parts:
        error_NXI = (A_NXR @ B_NRI).mul_(Q_NXI).sub_(weight_NXI).mul_(h_NI[:, None])
        right_NRI.baddbmm_(A_NXR.mT, error_NXI.mul_(Q_NXI))
        gram_NPI.baddbmm_(pairs(A_NXR.mT), Q_NXI.square().mul_(h_NI[:, None]))
    solve = solver(_symmetric(gram_NPI.mT, rank))
    return B_NRI - relaxation * solve(right_NRI.mT).mT


def _dot(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x * y).sum(dim=dims, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient; zero where a system is already solved."""
    return torch.where(below > 0, above / below.clamp_min(1e-30), 0.0)
