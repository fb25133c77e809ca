from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quant import alternation
from qat.quant.scales import look_up

devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA"))]
)


class Stack:
    """Random weights, importance, tables and scales of either sign, of N layers in float64."""

    def __init__(self, seed=0, layers=2, outputs=30, inputs=50, rank=3, entries=4, device="cpu"):
        draw = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)  # noqa: E731
        self.W, self.h = random(layers, outputs, inputs), random(layers, inputs).abs() + 0.1
        self.table, self.A, self.B = random(layers, entries).sort(1).values, *self.scales(random, rank)
        self.index = alternation.reassign(self.W, self.h, self.table, self.A, self.B)[0]

    def scales(self, random, rank):
        layers, outputs, inputs = self.W.shape
        return random(layers, outputs, rank), random(layers, rank, inputs)

    def error(self, table, index, A, B):
        return (self.h[:, None] * (self.W - look_up(table, index) * (A @ B)).square()).sum((1, 2))

    def arguments(self):
        return self.W, self.h, self.table, self.index, self.A, self.B


@devices
@pytest.mark.parametrize("entries", [2, 4, 16])
def test_indices_are_nearest_and_the_table_the_weighted_least_squares_for_them(entries, device):
    p = Stack(entries=entries, device=device)
    index, table = alternation.reassign(p.W, p.h, p.table, p.A, p.B)
    S = p.A @ p.B
    away = (p.W[..., None] - S[..., None] * p.table[:, None, None]).abs()
    assert index.dtype == torch.uint8 and torch.equal(index.long(), away.argmin(-1))
    for n in range(len(p.W)):
        for k in range(entries):
            mine = index[n] == k
            weight = p.h[n].expand_as(S[n])[mine]
            expected = (weight * p.W[n][mine] * S[n][mine]).sum() / (weight * S[n][mine].square()).sum()
            assert torch.isclose(table[n, k], expected if mine.any() else p.table[n, k])


def test_an_entry_that_no_weight_is_near_to_stays_and_so_does_one_of_weights_without_a_scale():
    p = Stack()
    p.table[:, 3] = 1e6
    p.A[:, 7] = 0
    table = alternation.reassign(p.W, p.h, p.table, p.A, p.B)[1]
    assert torch.equal(table[:, 3], p.table[:, 3]) and torch.isfinite(table).all()
    p.A[:] = 0
    assert torch.equal(alternation.reassign(p.W, p.h, p.table, p.A, p.B)[1], p.table)


def preconditioned(gram):
    return np.linalg.inv(gram + 1e-3 * gram.diagonal().mean() * np.eye(len(gram)))


def stepped(x, design, weight, target, shared):
    """One step of a small weighted least-squares problem, from its design matrix: the formula of the module."""
    slope = design.T @ (weight * (target - design @ x))
    step = shared @ slope
    return x + alternation.BEYOND * (slope @ step) / (weight * (design @ step) ** 2).sum() * step


@devices
def test_rows_and_columns_take_the_step_that_each_of_them_takes_alone(device):
    p = Stack(device=device)
    A, slope = alternation.move_rows(*p.arguments())
    B = alternation.move_columns(p.table, p.index, A, p.B, slope)
    found_A, found_B = A.cpu().numpy(), B.cpu().numpy()
    W, h, Q, old_A, old_B = (t.cpu().numpy() for t in (p.W, p.h, look_up(p.table, p.index), p.A, p.B))
    for n in range(len(W)):
        shared = preconditioned((old_B[n] * h[n]) @ old_B[n].T)
        for o in range(W.shape[1]):
            expected = stepped(old_A[n, o], Q[n, o, :, None] * old_B[n].T, h[n], W[n, o], shared)
            np.testing.assert_allclose(found_A[n, o], expected, rtol=1e-8)
        shared = preconditioned(found_A[n].T @ found_A[n])
        for i in range(W.shape[2]):
            expected = stepped(old_B[n, :, i], Q[n, :, i, None] * found_A[n], np.ones(W.shape[1]), W[n, :, i], shared)
            np.testing.assert_allclose(found_B[n, :, i], expected, rtol=1e-8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([2, 4, 16]))
def test_no_part_of_a_round_raises_the_error_of_any_layer(seed, rank, entries):
    p = Stack(seed, outputs=9, inputs=14, rank=rank, entries=entries)
    index, table = alternation.reassign(p.W, p.h, p.table, p.A, p.B)
    A, slope = alternation.move_rows(p.W, p.h, table, index, p.A, p.B)
    B = alternation.move_columns(table, index, A, p.B, slope)
    errors = [
        p.error(table, index, p.A, p.B),
        p.error(table, index, A, p.B),
        p.error(table, index, A, B),
    ]
    anything = torch.randint(entries, p.W.shape, generator=torch.Generator().manual_seed(seed))
    assert (p.error(p.table, index, p.A, p.B) <= p.error(p.table, anything, p.A, p.B)).all()
    assert (errors[0] <= p.error(p.table, index, p.A, p.B) * (1 + 1e-12)).all()
    assert all((after <= before * (1 + 1e-12)).all() for before, after in pairwise(errors))


def test_rounds_reach_what_exact_solutions_reach():
    """The rounds that this replaces: every row and column solved for, indices and table as here."""
    p = Stack(seed=1, layers=1, outputs=200, inputs=300, rank=4)
    A, B, table = p.A.abs(), p.B.abs(), p.table
    exact = fast = (table, A, B)
    for _ in range(8):
        table, A, B = exact
        index, table = alternation.reassign(p.W, p.h, table, A, B)
        Q = look_up(table, index)[0]
        rows = torch.einsum("oi,ri,i,si->ors", Q.square(), B[0], p.h[0], B[0])
        A = torch.linalg.solve(rows, ((Q * p.W[0] * p.h[0]) @ B[0].T)[..., None])[None, ..., 0]
        columns = torch.einsum("oi,or,os->irs", Q.square(), A[0], A[0])
        B = torch.linalg.solve(columns, ((Q * p.W[0]).T @ A[0])[..., None])[None, ..., 0].mT
        exact = (table.sort(1).values, A, B) if (table.diff() > 0).all() else pytest.fail("a table out of order")
        table, A, B = fast
        index, table = alternation.reassign(p.W, p.h, table, A, B)
        A, slope = alternation.move_rows(p.W, p.h, table, index, A, B)
        fast = table, A, alternation.move_columns(table, index, A, B, slope)
    errors = [p.error(t, alternation.reassign(p.W, p.h, t, a, b)[0], a, b) for t, a, b in (exact, fast)]
    assert errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("at_once", [1, 100, 1000])
def test_the_size_of_blocks_changes_nothing_but_rounding(monkeypatch, at_once):
    p = Stack()
    expected = alternation.reassign(p.W, p.h, p.table, p.A, p.B), alternation.move_rows(*p.arguments())
    columns = alternation.move_columns(p.table, p.index, p.A, p.B, expected[1][1])
    monkeypatch.setattr("qat.quant.alternation.AT_ONCE", {"cpu": at_once})
    found = alternation.reassign(p.W, p.h, p.table, p.A, p.B), alternation.move_rows(*p.arguments())
    assert torch.equal(found[0][0], expected[0][0]) and torch.allclose(found[0][1], expected[0][1])
    assert all(torch.allclose(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert torch.allclose(alternation.move_columns(p.table, p.index, p.A, p.B, expected[1][1]), columns)


def test_a_stack_gives_what_each_layer_gives_alone():
    p = Stack(layers=3)
    together = alternation.move_rows(*p.arguments())
    for n in range(3):
        alone = alternation.move_rows(*(t[n : n + 1] for t in p.arguments()))
        assert all(torch.allclose(a[0], b[n]) for a, b in zip(alone, together, strict=True))


def test_idle_ranks_rows_of_zeros_and_dead_columns_stay_finite():
    p = Stack(rank=5)
    p.A[:, :, 4], p.B[:, 4], p.W[:, 3], p.A[:, 6], p.W[:, :, 9] = 0, 0, 0, 0, 0
    A, slope = alternation.move_rows(*p.arguments())
    B = alternation.move_columns(p.table, p.index, A, p.B, slope)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert not A[:, :, 4].any()  # what multiplies nothing has no slope
