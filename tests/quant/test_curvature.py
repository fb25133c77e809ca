import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.quant import assign, curvature, kmeans
from qat.quant.curvature import Curvature, Factor, damp
from qat.quant.fit import Problem, fit, improve
from qat.quant.formats import Codebook
from qat.quant.formats.codebook_fit import Codebooks, refine, start


def second_moment(size, draw, layers=2):
    x = torch.randn(layers, 2 * size, size, generator=draw) @ torch.randn(layers, size, size, generator=draw)
    return x.mT @ x / (2 * size)


CODEBOOK = Codebook(bits=2, rank=4)


def problem(seed=0, outputs=40, inputs=70):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, outputs, inputs, generator=draw)
    return weight, second_moment(inputs, draw), second_moment(outputs, draw)


def test_the_cost_is_that_of_the_kronecker_product():
    weight, H, G = (t.double() for t in problem(outputs=5, inputs=6))
    for n in range(2):
        flat = weight[n].flatten()
        expected = flat @ torch.kron(G[n], H[n]) @ flat
        assert float(Curvature(H, G).cost(weight)[n]) == pytest.approx(float(expected))
    assert torch.allclose(Curvature(H).cost(weight), Curvature(H, torch.eye(5).expand(2, -1, -1).double()).cost(weight))


@pytest.mark.parametrize("columns", [1, 4, 5, 70])
def test_the_cost_of_separate_rows_takes_half_of_the_products(columns, monkeypatch):
    monkeypatch.setattr("qat.quant.curvature.COLUMNS", columns)
    weight, H, _ = (t.double() for t in problem())
    expected = torch.einsum("noi,nij,noj->n", weight, H, weight)
    assert torch.allclose(Curvature(H).cost(weight), expected)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_factor_is_that_of_the_inverse(dim, monkeypatch):
    """Against the definition in float64, with triangular matrices inverted in halves, odd ones too."""
    monkeypatch.setattr("qat.quant.curvature.INVERTED", 16)
    H = second_moment(70, torch.Generator().manual_seed(0))
    made, exact = Factor.of(H, dim), damp(H.double())
    for n in range(2):
        order = made.order_NI[n]
        upper = torch.linalg.cholesky(torch.linalg.inv(exact[n][order][:, order]), upper=True)
        for first in range(0, 70, dim):
            block = slice(first, first + dim)
            corner = torch.linalg.inv(upper[block, block])
            assert torch.allclose(made.metric_NBDD[n, first // dim].double(), corner @ corner.T, rtol=1e-3)
            behind = -(corner @ upper[block, first + dim :])
            found = made.spread_NII[n, block, first + dim :].double()
            assert torch.allclose(
                found, behind, rtol=1e-3, atol=1e-3 * float(behind.abs().amax() if behind.numel() else 0)
            )


def test_the_slope_is_half_the_gradient_of_the_cost():
    weight, H, G = (t.double() for t in problem(outputs=5, inputs=6))
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(Curvature(H, G).cost(weight).sum(), weight)
    assert torch.allclose(Curvature(H, G).slope(weight), gradient / 2)


def test_rows_scaled_by_the_outputs_curvature_cost_what_unscaled_ones_do():
    weight, H, G = problem()
    coupling, row = curvature.normalized(G)
    assert torch.allclose(coupling.diagonal(dim1=1, dim2=2), torch.ones(2, 40), atol=1e-5)
    plain = Curvature(H, damp(G, curvature.OUTPUT_DAMPING)).cost(weight)
    scaled = Curvature(H, coupling).cost(weight * row[:, :, None])
    assert torch.allclose(scaled / scaled[0], plain / plain[0] * (mean(G)[0] / mean(G)), rtol=1e-4)


def mean(G):
    return damp(G, curvature.OUTPUT_DAMPING).diagonal(dim1=1, dim2=2).mean(1)


@given(st.integers(0, 1000))
def test_neither_descent_nor_refinement_ever_raises_the_coupled_cost(seed):
    weight, H, G = problem(seed, outputs=70, inputs=20)
    posed = Problem(weight, H, Factor.of(H), G)
    codebooks = start(posed.weight_NOI, posed.importance_NI, 4, 3, kmeans.kmeans)
    cost = lambda t: exact_cost(posed, t)  # noqa: E731
    S, codebook, before = codebooks.scale(), codebooks.codebook_NK, codebooks.index_NOI
    index = assign.descended(posed.weight_NOI, S, codebook, posed.curvature, before)
    moved = type(codebooks)(index, codebooks.codebook_NK, codebooks.A_NOR, codebooks.B_NRI)
    assert (cost(moved) <= cost(codebooks) * (1 + 1e-6)).all()
    assert (cost(refine(moved, posed.weight_NOI, posed.curvature)) <= cost(moved) * (1 + 1e-5)).all()


def exact_cost(posed, codebooks):
    exact = Curvature(posed.curvature.inputs_NII.double(), posed.curvature.outputs_NOO.double())
    return exact.cost((posed.weight_NOI - codebooks.weight()).double())


def test_knowing_the_outputs_curvature_lowers_the_cost_under_it():
    weight, H, G = problem(outputs=96, inputs=64)
    found = {}
    for known in (None, G):
        made = fit(Problem(weight, H, Factor.of(H), known), CODEBOOK, kmeans.kmeans, rounds=4, sweeps=2)
        found[known is G] = Curvature(H, G).cost(weight - Codebooks.of(made).weight())
    assert (found[True] < 0.9 * found[False]).all()


def test_improving_goes_on_from_given_codebooks():
    weight, H, G = problem()
    posed = Problem(weight, H, Factor.of(H), G)
    first = fit(posed, CODEBOOK, kmeans.kmeans, rounds=4, sweeps=0)
    later = improve(posed, CODEBOOK, first, sweeps=4)
    before, after = (exact_cost(posed, Codebooks.of(posed.enter(CODEBOOK, made))) for made in (first, later))
    assert (after < before).all()


def test_a_joined_factor_is_that_of_the_stack():
    _, H, _ = problem()
    joined, whole = Factor.join([Factor.of(H[:1]), Factor.of(H[1:])]), Factor.of(H)
    assert torch.equal(joined.order_NI, whole.order_NI)
    assert torch.allclose(joined.spread_NII, whole.spread_NII, rtol=1e-3, atol=1e-4)
