import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quant import least_squares, lookup
from qat.quant.curvature import Curvature


class Problem:
    """Random weights, codebook, indices, scales and second moments of N layers."""

    def __init__(self, seed=0, layers=2, outputs=7, inputs=9, rank=3, entries=4):
        draw = torch.Generator().manual_seed(seed)
        self.W = torch.randn(layers, outputs, inputs, generator=draw)
        self.codebook = torch.randn(layers, entries, generator=draw).sort(1).values
        self.index = torch.randint(entries, self.W.shape, generator=draw).to(torch.uint8)
        self.A = torch.randn(layers, outputs, rank, generator=draw)
        self.B = torch.randn(layers, rank, inputs, generator=draw)
        self.h = torch.rand(layers, inputs, generator=draw) + 0.1
        x = torch.randn(layers, 4 * inputs, inputs, generator=draw)
        x = x + x.roll(1, dims=2)  # neighbouring inputs go together
        self.H = x.mT @ x / x.shape[1]
        self.Q = lookup.look_up(self.codebook, self.index)

    def linear(self, kind: str, h: torch.Tensor) -> tuple[torch.Tensor, least_squares.Linear]:
        """The unknowns of a kind, and how the weight depends on them."""
        if kind == "rows":
            return self.A, least_squares.rows(self.Q, self.B, h)
        if kind == "columns":
            return self.B, least_squares.columns(self.Q, self.A, h)
        return self.codebook, least_squares.codebook(self.index, self.A @ self.B, h, self.codebook.shape[1])

    def design(self, kind: str, n: int) -> np.ndarray:
        """Matrix [O·I, unknowns] of layer n from the unknowns, flattened, to its weight, in float64."""
        Q, A, B = (t[n].double().numpy() for t in (self.Q, self.A, self.B))
        index, S = self.index[n].numpy(), A @ B
        outputs, inputs, rank, entries = *Q.shape, len(B), self.codebook.shape[1]
        made = {"rows": outputs * rank, "columns": rank * inputs, "codebook": entries}
        matrix = np.zeros((outputs, inputs, made[kind]))
        for o in range(outputs):
            for i in range(inputs):
                if kind == "codebook":
                    matrix[o, i, index[o, i]] = S[o, i]
                for r in range(rank):
                    if kind == "rows":
                        matrix[o, i, o * rank + r] = Q[o, i] * B[r, i]
                    if kind == "columns":
                        matrix[o, i, r * inputs + i] = Q[o, i] * A[o, r]
        return matrix.reshape(outputs * inputs, -1)

    def damping(self, kind: str, gram: np.ndarray) -> np.ndarray:
        """1e-3 of the mean diagonal of each small system, for each unknown; a codebook has none."""
        rank = self.A.shape[2]
        if kind == "codebook":
            return np.zeros(len(gram))
        if kind == "rows":
            return 1e-3 * np.repeat(gram.diagonal().reshape(-1, rank).mean(1), rank)
        return 1e-3 * np.tile(gram.diagonal().reshape(rank, -1).mean(0), rank)


KINDS = ["rows", "columns", "codebook"]


def diagonal_error(p: Problem, linear: least_squares.Linear, x: torch.Tensor) -> torch.Tensor:
    return (p.h[:, None] * (p.W - linear.expand(x)).double().square()).sum((1, 2))


def full_error(p: Problem, linear: least_squares.Linear, x: torch.Tensor) -> torch.Tensor:
    E = (p.W - linear.expand(x)).double()
    return torch.einsum("noi,nij,noj->n", E, p.H.double(), E)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_depends_on_the_unknowns_as_the_design_matrix_says(kind):
    p = Problem()
    x, linear = p.linear(kind, p.h)
    error = torch.randn(p.W.shape, generator=torch.Generator().manual_seed(3))
    for n in range(len(p.W)):
        matrix = p.design(kind, n)
        expanded = matrix @ x[n].double().flatten().numpy()
        np.testing.assert_allclose(linear.expand(x)[n].flatten(), expanded, rtol=1e-4, atol=1e-5)
        reduced = matrix.T @ error[n].double().flatten().numpy()
        np.testing.assert_allclose(linear.reduce(error.clone())[n].flatten(), reduced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_refit_is_weighted_least_squares_damped_towards_the_last_value(kind):
    p = Problem()
    x, linear = p.linear(kind, p.h)
    found = least_squares.refit(x, linear, p.W, p.h)
    for n in range(len(p.W)):
        matrix, before = p.design(kind, n), x[n].double().flatten().numpy()
        weight = np.tile(p.h[n].double().numpy(), p.W.shape[1])
        gram = matrix.T @ (weight[:, None] * matrix)
        damping = p.damping(kind, gram)
        right = matrix.T @ (weight * p.W[n].double().flatten().numpy()) + damping * before
        expected = np.linalg.solve(gram + np.diag(damping), right)
        np.testing.assert_allclose(found[n].flatten(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_columns_are_refitted_from_some_rows_after_the_others(size):
    p = Problem()
    whole = least_squares.refit(p.B, least_squares.columns(p.Q, p.A, p.h), p.W, p.h, 1.5)
    parts = zip(*(x.split(size, 1) for x in (p.A, p.Q, p.W)), strict=True)
    assert torch.allclose(least_squares.refit_columns(p.B, parts, p.h, 1.5), whole, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_refit_never_raises_the_weighted_error(seed, kind, rank, relaxation):
    p = Problem(seed, rank=rank)
    x, linear = p.linear(kind, p.h)
    found = least_squares.refit(x, linear, p.W, p.h, relaxation)
    assert (diagonal_error(p, linear, found) <= diagonal_error(p, linear, x) * (1 + 1e-5)).all()


def test_relaxation_goes_a_multiple_of_the_way():
    p = Problem()
    x, linear = p.linear("rows", p.h)
    minimum, beyond = (least_squares.refit(x, linear, p.W, p.h, relaxation) for relaxation in (1.0, 1.5))
    assert torch.allclose(beyond - x, 1.5 * (minimum - x), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(0, 40), st.integers(1, 12))
def test_conjugate_gradients_never_raise_the_output_error(seed, kind, iterations, rank):
    p = Problem(seed, rank=rank)
    x, linear = p.linear(kind, p.H.diagonal(dim1=1, dim2=2))
    before = full_error(p, linear, x)
    after = full_error(p, linear, least_squares.conjugate_gradient(x, linear, p.W, Curvature(p.H), iterations))
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_what_is_left_follows_one_set_of_unknowns_after_the_other(coupled):
    p = Problem()
    G = torch.eye(7) + 0.3 * torch.ones(7, 7) if coupled else None
    cost = Curvature(p.H, None if G is None else G.expand(2, -1, -1))
    left, h = least_squares.Left(p.W - p.Q * (p.A @ p.B), cost), p.H.diagonal(dim1=1, dim2=2)
    p.A = least_squares.conjugate_gradient(p.A, p.linear("rows", h)[1], p.W, cost, 3, left=left)
    p.B = least_squares.conjugate_gradient(p.B, p.linear("columns", h)[1], p.W, cost, 3, left=left)
    x, linear = p.linear("codebook", h)
    alone = least_squares.conjugate_gradient(x, linear, p.W, cost, 3)
    found = least_squares.conjugate_gradient(x, linear, p.W, cost, 3, left=left)
    assert torch.allclose(found, alone, rtol=1e-3, atol=1e-4)
    error = (p.W - linear.expand(found)).double()
    exact = Curvature(p.H.double(), None if G is None else G.double().expand(2, -1, -1))
    assert torch.allclose(left.cost_N.double(), exact.cost(error), rtol=1e-4)
    assert torch.allclose(left.slope_NOI.double(), exact.slope(error), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_stops_where_little_of_the_cost_is_left_to_gain(kind):
    p = Problem(outputs=12, rank=2)
    x, linear = p.linear(kind, p.H.diagonal(dim1=1, dim2=2))
    cost = lambda iterations, enough: full_error(  # noqa: E731
        p, linear, least_squares.conjugate_gradient(x, linear, p.W, Curvature(p.H), iterations, enough)
    )
    assert torch.equal(cost(9, 1e3), cost(0, 0.0))
    assert (cost(100, least_squares.ENOUGH) <= cost(100, 0.0) * 1.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_gradients_reach_the_dense_solution(kind):
    p = Problem(outputs=12, rank=2)
    x, linear = p.linear(kind, p.H.diagonal(dim1=1, dim2=2))
    found = least_squares.conjugate_gradient(x, linear, p.W, Curvature(p.H), 100)
    for n in range(len(p.W)):
        matrix = p.design(kind, n)
        H = np.kron(np.eye(p.W.shape[1]), p.H[n].double().numpy())
        expected = np.linalg.solve(matrix.T @ H @ matrix, matrix.T @ H @ p.W[n].double().flatten().numpy())
        np.testing.assert_allclose(found[n].flatten(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_solved_system_stays_where_it_is(kind):
    p = Problem()
    x, linear = p.linear(kind, p.H.diagonal(dim1=1, dim2=2))
    p.W = linear.expand(x)
    assert torch.equal(least_squares.conjugate_gradient(x, linear, p.W, Curvature(p.H), 8), x)


def test_an_entry_that_no_index_uses_stays_as_it_is():
    p = Problem()
    p.index[p.index == 2] = 1
    x, linear = p.linear("codebook", p.h)
    assert torch.equal(least_squares.refit(x, linear, p.W, p.h)[:, 2], p.codebook[:, 2])
    assert torch.equal(least_squares.conjugate_gradient(x, linear, p.W, Curvature(p.H), 8)[:, 2], p.codebook[:, 2])


def test_scales_that_multiply_nothing_stay_as_they_are():
    p = Problem()
    p.B[:, 1] = 0  # an idle rank
    p.Q[:, 3] = 0  # a row of zeros
    x, linear = p.linear("rows", p.h)
    found = least_squares.refit(x, linear, p.W, p.h)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, :, 1], p.A[:, :, 1]) and torch.equal(found[:, 3], p.A[:, 3])


def test_entry_sums_and_look_up_are_what_indexing_gives():
    p = Problem()
    expected = torch.stack(
        [torch.zeros(4).index_add(0, p.index[n].flatten().long(), p.W[n].flatten()) for n in range(len(p.W))]
    )
    assert torch.allclose(lookup.entry_sums(p.W, p.index, 4), expected, atol=1e-5)
    assert torch.equal(p.Q[1], p.codebook[1][p.index[1].long()])


SHAPES = [(5, 8), (1, 3), (64, 8), (37, 5), (130, 3), (200, 2), (640, 4), (576, 32)]


@pytest.mark.parametrize(("inputs", "rank"), SHAPES)
def test_the_first_scales_are_twice_the_magnitude_where_rows_have_one(inputs, rank):
    size = torch.tensor([[0.5, 1.0, 0.0, 2.0, 0.1]])
    sign = torch.randn(1, 5, inputs, generator=torch.Generator().manual_seed(0)).sign()
    A, B = least_squares.initial(size[..., None] * sign, rank)
    assert A.shape == (1, 5, rank) and B.shape == (1, rank, inputs)
    assert torch.allclose(A @ B, (2 * size[..., None]).expand(1, 5, inputs), atol=1e-5)


def test_with_as_many_groups_as_ranks_the_first_scales_are_the_group_means():
    W = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    A, B = least_squares.initial(W, 8)
    means = 2 * W.double().abs().reshape(2, 6, 8, 8).mean(3)
    assert torch.allclose((A @ B).double(), means.repeat_interleave(8, dim=2), atol=1e-5)


def test_with_more_groups_than_ranks_the_first_scales_are_the_best_approximation_of_the_means():
    W = torch.randn(2, 12, 640, generator=torch.Generator().manual_seed(2))
    A, B = least_squares.initial(W, 3)
    for n in range(2):
        u, s, v = np.linalg.svd(2 * np.abs(W[n].double().numpy()).reshape(12, 10, 64).mean(2))
        expected = (u[:, :3] * s[:3]) @ v[:3]
        np.testing.assert_allclose((A @ B)[n], np.repeat(expected, 64, axis=1), atol=1e-5)


def test_with_fewer_inputs_than_ranks_the_rest_is_idle():
    W = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(3))
    A, B = least_squares.initial(W, 5)
    assert torch.allclose(A @ B, 2 * W.abs(), atol=1e-6)
    assert not A[..., 3:].any() and not B[:, 3:].any()
