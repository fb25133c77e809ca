import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quant import assign, lookup
from qat.quant.curvature import Curvature, Factor, damp


def problem(seed=0, layers=2, outputs=32, inputs=150, entries=4):
    """Weights, scales, codebooks and the second moment of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layers, inputs, inputs, generator=draw) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(layers, 3 * inputs, inputs, generator=draw) @ mixing
    x = x * (torch.rand(layers, 1, inputs, generator=draw) * 3 + 0.1)
    weight = torch.randn(layers, outputs, inputs, generator=draw)
    S = torch.rand(layers, outputs, inputs, generator=draw) + 0.5
    codebook = torch.randn(layers, entries, generator=draw).sort(1).values * 1.5
    return weight, S, codebook, x.mT @ x / x.shape[1]


def plain_gptq(weight, S, codebook, H):
    """One layer in float64: fix a column, spread its error, eliminate it from the inverse; no factor, no blocks."""
    weight, S, codebook, H = (t.double().numpy() for t in (weight, S, codebook, H))
    H = H + 0.01 * H.diagonal().mean() * np.eye(len(H))
    left, inverse = weight.copy(), np.linalg.inv(H)
    index = np.zeros(weight.shape, dtype=np.uint8)
    for j in np.argsort(-H.diagonal(), kind="stable"):
        grid = S[:, j, None] * codebook
        index[:, j] = np.abs(left[:, j, None] - grid).argmin(1)
        error = left[:, j] - grid[np.arange(len(grid)), index[:, j]]
        left -= np.outer(error, inverse[j] / inverse[j, j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with; its row and column are zero from here on
    return index


def output_error(weight, S, codebook, index, H):
    return Curvature(H.double()).cost((weight - lookup.look_up(codebook, index) * S).double())


@pytest.mark.parametrize("inputs", [1, 20, 64, 65, 150])
def test_compensated_indices_are_those_of_plain_gptq(inputs):
    weight, S, codebook, H = problem(inputs=inputs)
    found = assign.compensated(weight, S, codebook, Factor.of(H))
    expected = torch.stack([torch.from_numpy(plain_gptq(*layer)) for layer in zip(weight, S, codebook, H, strict=True)])
    assert found.dtype == torch.uint8
    same_rows = (found == expected).all(2).float().mean()
    assert same_rows > 0.95  # a rounding error may tip a weight that lies between two entries
    errors = output_error(weight, S, codebook, found, H), output_error(weight, S, codebook, expected, H)
    assert torch.allclose(*errors, rtol=1e-2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_compensation_lowers_the_output_error_of_nearest_indices(seed):
    weight, S, codebook, H = problem(seed, inputs=80)
    compensated = assign.compensated(weight, S, codebook, Factor.of(H))
    before = output_error(weight, S, codebook, assign.nearest(weight, S, codebook), H)
    assert (output_error(weight, S, codebook, compensated, H) < 0.95 * before).all()


def test_without_correlations_compensation_has_nothing_to_add():
    weight, S, codebook, _ = problem()
    H = torch.diag_embed(torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert torch.equal(assign.compensated(weight, S, codebook, Factor.of(H)), assign.nearest(weight, S, codebook))


def test_the_arguments_are_left_alone():
    arguments = problem()
    before = [t.clone() for t in arguments]
    weight, S, codebook, H = arguments
    assign.compensated(weight, S, codebook, Factor.of(H))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_nearest_is_the_least_error_of_each_weight_alone_whatever_the_sign_of_its_scale(seed):
    weight, S, codebook, _ = problem(seed, inputs=10)
    S = S * torch.randn(S.shape, generator=torch.Generator().manual_seed(seed)).sign()
    errors = (weight[..., None] - S[..., None] * codebook[:, None, None]).abs()
    index = assign.nearest(weight, S, codebook)
    assert torch.allclose(errors.gather(3, index.long()[..., None])[..., 0], errors.amin(3), atol=1e-5)


def test_a_scale_of_zero_gives_an_index_and_no_nan():
    weight, S, codebook, H = problem(inputs=20)
    S[:, :, 3], S[:, 4], weight[:, :, 5] = 0, 0, 0
    assert not lookup.relative(weight, S).isnan().any()
    for index in (assign.nearest(weight, S, codebook), assign.compensated(weight, S, codebook, Factor.of(H))):
        assert index.max() <= 3


@pytest.mark.parametrize("dead", [slice(0, 5), slice(0, 149), slice(0, 150)])
def test_inputs_never_seen_are_assigned_all_the_same(dead):
    weight, S, codebook, H = problem()
    H[:, dead], H[:, :, dead] = 0, 0
    factor = Factor.of(H)
    assert torch.isfinite(factor.spread_NII).all()
    index = assign.compensated(weight, S, codebook, factor)
    assert torch.equal(index[:, :, dead], assign.nearest(weight, S, codebook)[:, :, dead])


def one_at_a_time(weight, S, codebook, H, index):
    """One sweep in float64: every entry of every column tried, the output error of each computed in full."""
    weight, S, codebook, H = (t.double() for t in (weight, S, codebook, H))
    index = index.clone()
    for j in range(weight.shape[1]):
        errors = []
        for k in range(len(codebook)):
            index[:, j] = k
            E = weight - codebook[index.long()] * S
            errors.append(((E @ H) * E).sum(1))
        index[:, j] = torch.stack(errors).argmin(0)
    return index


@pytest.mark.parametrize("inputs", [1, 64, 70])
def test_descended_indices_are_those_of_trying_every_entry(inputs):
    weight, S, codebook, H = problem(outputs=8, inputs=inputs)
    index = assign.nearest(weight, S, codebook)
    found = assign.descended(weight, S, codebook, Curvature(H), index)
    expected = torch.stack([one_at_a_time(*layer) for layer in zip(weight, S, codebook, H, index, strict=True)])
    assert (found == expected).all(2).float().mean() > 0.9
    errors = output_error(weight, S, codebook, found, H), output_error(weight, S, codebook, expected, H)
    assert torch.allclose(*errors, rtol=1e-2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.booleans())
def test_descent_never_raises_the_output_error(seed, anywhere):
    weight, S, codebook, H = problem(seed, inputs=80)
    index = assign.compensated(weight, S, codebook, Factor.of(H))
    if anywhere:
        index = torch.randint(4, index.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    before = output_error(weight, S, codebook, index, H)
    after = output_error(weight, S, codebook, assign.descended(weight, S, codebook, Curvature(H), index), H)
    assert (after <= before * (1 + 1e-5)).all()


def test_damping_is_a_hundredth_of_the_mean_diagonal():
    _, _, _, H = problem(inputs=20)
    added = damp(H) - H
    expected = 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)
    assert torch.allclose(added, expected[:, None, None] * torch.eye(20), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45])
def test_nearest_gives_an_entry_of_the_codebook_where_a_scale_touches_zero(scale):
    weight, codebook = torch.tensor([[[-1.0, 0.0, 1.0, 3e38]]]), torch.tensor([[-1.0, 0.0, 1.0]])
    index = assign.nearest(weight, torch.full_like(weight, scale), codebook)
    assert index.dtype == torch.uint8 and (index < 3).all()
