"""The fit of grids: scales and shifts against solutions in float64, and a cost that falls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.quant.curvature import Curvature, Factor
from qat.quant.fit import Problem, fit, importance, improve
from qat.quant.formats import Fitted, GroupGrid, grid
from tests.quant.test_curvature import problem

BOTH = [GroupGrid(2, 8), GroupGrid(3, 8, levels="shifted")]
both = pytest.mark.parametrize("format", BOTH, ids=str)


def no_codebook(*_):
    raise AssertionError("a grid's values are fixed")


def weight_of(format: GroupGrid, made: Fitted):
    return format.grid(made.operands).at(made.index_NOI)


def fitted(format, weight, H, G=None, rounds=4, sweeps=0):
    posed = Problem(weight, H, Factor.of(H), G)
    return posed, fit(posed, format, no_codebook, rounds, sweeps)


def design(format: GroupGrid, index_I):
    """What scales and shifts of one row [G·P] are multiplied with for its weights, [I, G·P] float64."""
    q = index_I.double() if format.shifts else index_I.double() - (2**format.bits - 1) / 2
    columns = torch.stack([q, torch.ones_like(q)], 1) if format.shifts else q[:, None]
    return torch.block_diag(*columns.split(format.group))


def numbers(format, operands, n, o):
    """Scales and shifts of one row, [G·P] float64."""
    return torch.stack([operands[name][n, o] for name in format.rowwise], 1).double().flatten()


@both
@pytest.mark.parametrize("seed", range(3))
def test_a_round_ends_at_the_least_weighted_squares(format, seed, monkeypatch):
    monkeypatch.setattr("qat.quant.least_squares.DAMPING", 0.0)
    weight, H, _ = problem(seed, outputs=6, inputs=24)
    h = importance(H)
    first = format.start(weight, h, no_codebook)
    second = format.alternated(first, weight, h)
    for n in range(len(weight)):
        for o in range(6):
            X, root = design(format, first.index_NOI[n, o]), h[n].double().sqrt()[:, None]
            best = torch.linalg.pinv(root * X) @ (root[:, 0] * weight[n, o].double())
            left = lambda x: (root[:, 0] * (X @ x - weight[n, o])).square().sum()  # noqa: B023, E731
            assert left(numbers(format, second.operands, n, o)) <= left(best) * (1 + 1e-4) + 1e-10


@both
def test_refined_scales_solve_the_whole_normal_equations(format, monkeypatch):
    monkeypatch.setattr(grid, "CG_ITERATIONS", 60)
    monkeypatch.setattr("qat.quant.least_squares.ENOUGH", 0.0)
    weight, H, _ = problem(0, outputs=4, inputs=24)
    posed, made = fitted(format, weight, H, rounds=1)
    cost = Curvature(posed.curvature.inputs_NII.double())
    refined = format.refined(made, posed.weight_NOI, posed.curvature)
    for n in range(len(weight)):
        M = cost.inputs_NII[n]
        for o in range(4):
            X, w = design(format, made.index_NOI[n, o]), posed.weight_NOI[n, o].double()
            best = torch.linalg.pinv(X.T @ M @ X) @ (X.T @ M @ w)
            left = lambda x: (X @ x - w) @ M @ (X @ x - w)  # noqa: B023, E731
            assert left(numbers(format, refined.operands, n, o)) <= left(best) * 1.001


@given(st.integers(0, 1000), st.sampled_from(BOTH), st.booleans())
def test_refinement_and_sweeps_never_raise_the_cost(seed, format, coupled):
    weight, H, G = problem(seed, outputs=34, inputs=16)
    posed, first = fitted(format, weight, H, G if coupled else None, rounds=2)
    exact = Curvature(posed.curvature.inputs_NII.double(), posed.curvature.outputs_NOO.double() if coupled else None)
    cost = lambda made: exact.cost((posed.weight_NOI - weight_of(format, made)).double())  # noqa: E731
    entered = posed.enter(format, first)
    refined = format.refined(entered, posed.weight_NOI, posed.curvature)
    assert (cost(refined) <= cost(entered) * (1 + 1e-5)).all()


@pytest.mark.parametrize("format", [GroupGrid(2, 8), GroupGrid(1, 8, levels="shifted")], ids=str)
def test_a_weight_of_the_very_form_is_found_again(format):
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(2**format.bits, (1, 16, 32), generator=draw).to(torch.uint8)
    index[:, :, :: format.group], index[:, :, 1 :: format.group] = 0, 2**format.bits - 1  # groups use their range
    operands = {name: torch.rand(1, 16, 4, generator=draw) + 0.5 for name in format.rowwise}
    weight = format.grid(operands).at(index)
    _, H, _ = problem(0, outputs=16, inputs=32)
    _, made = fitted(format, weight, H[:1], rounds=12, sweeps=2)
    assert (weight_of(format, made) - weight).norm() < 2e-2 * weight.norm()


@both
def test_each_step_of_the_fit_is_worth_something(format):
    weight, H, G = problem(0, outputs=64, inputs=64)
    cost = lambda made: float(Curvature(H, G).cost(weight - weight_of(format, made)).sum())  # noqa: E731
    plain = format.start(weight, importance(H), no_codebook)
    _, once = fitted(format, weight, H, rounds=4)
    posed, known = fitted(format, weight, H, G, rounds=4)
    again = improve(posed, format, known, sweeps=4)
    assert cost(once) < 0.9 * cost(plain) and cost(known) < 0.95 * cost(once) and cost(again) < 0.95 * cost(known)


def test_shifts_are_worth_something_where_groups_do_not_lie_around_zero():
    weight, H, _ = problem(0, outputs=32, inputs=32)
    weight = weight + 2 * weight.abs().mean()
    left = {}
    for levels in ("halves", "shifted"):
        format = GroupGrid(3, 8, levels)
        left[levels] = float((weight - weight_of(format, fitted(format, weight, H)[1])).norm())
    assert left["shifted"] < 0.8 * left["halves"]


@both
@pytest.mark.parametrize("what", ["rows", "group", "unseen"])
def test_zeros_and_inputs_never_seen_give_finite_scales(format, what):
    weight, H, _ = problem(0, outputs=12, inputs=32)
    if what == "rows":
        weight[:, :3] = 0
    elif what == "group":
        weight[:, :, 8:16] = 0
    else:
        H[:, 8:], H[:, :, 8:] = 0, 0
    _, made = fitted(format, weight, H, sweeps=1)
    found = weight_of(format, made)
    assert torch.isfinite(found).all() and (found - weight).norm() < weight.norm()
