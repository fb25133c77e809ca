from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qat.quant import assign, kmeans, least_squares
from qat.quant.curvature import Curvature, Factor, damp
from qat.quant.fit import Problem, fit, importance
from qat.quant.formats import Codebook
from qat.quant.formats.codebook_fit import RELAXATION, Codebooks, alternate, refine, sample, start


def problem(seed=0, layers=3, outputs=48, inputs=96):
    """Heavy-tailed weights of uneven rows, and the second moment of correlated, uneven inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(layers, outputs, inputs, generator=draw) ** 3 * 0.01
    weight = weight * (torch.rand(layers, outputs, 1, generator=draw) + 0.2)
    x = torch.randn(layers, 400, inputs // 2, generator=draw) @ torch.randn(layers, inputs // 2, inputs, generator=draw)
    x = (x + torch.randn(x.shape, generator=draw)) * (torch.rand(layers, 1, inputs, generator=draw) * 4 + 0.05)
    return weight, x.mT @ x / 400


def fitted(weight, H, bits=2, rank=4, rounds=4, sweeps=0) -> Codebooks:
    problem = Problem(weight, H, Factor.of(H))
    return Codebooks.of(fit(problem, Codebook(bits, rank), kmeans.kmeans, rounds=rounds, sweeps=sweeps))


def exact(codebooks: Codebooks) -> Codebooks:
    learned = (codebooks.codebook_NK, codebooks.A_NOR, codebooks.B_NRI)
    return Codebooks(codebooks.index_NOI, *(x.double() for x in learned))


def output_error(codebooks: Codebooks, weight, H):
    return Curvature(H.double()).cost((weight - codebooks.weight()).double())


def relative_error(codebooks: Codebooks, weight, H):
    return output_error(codebooks, weight, H) / Curvature(H.double()).cost(weight.double())


@pytest.mark.parametrize(("bits", "rank"), [(1, 1), (2, 4), (3, 8), (4, 2)])
def test_the_fit_has_the_promised_form(bits, rank):
    weight, H = problem(outputs=20, inputs=33)
    codebooks = fitted(weight, H, bits, rank, rounds=2)
    assert codebooks.index_NOI.shape == weight.shape and codebooks.index_NOI.dtype == torch.uint8
    assert codebooks.index_NOI.max() < 2**bits
    assert codebooks.codebook_NK.shape == (3, 2**bits) and (codebooks.codebook_NK.diff(dim=1) >= 0).all()
    assert codebooks.A_NOR.shape == (3, 20, rank) and codebooks.B_NRI.shape == (3, rank, 33)
    expected = torch.stack([t[i.long()] for t, i in zip(codebooks.codebook_NK, codebooks.index_NOI, strict=True)])
    assert torch.equal(codebooks.weight(), expected * (codebooks.A_NOR @ codebooks.B_NRI))


def test_a_batch_gives_what_each_layer_gives_alone():
    weight, H = problem()
    together = fitted(weight, H)
    for n in range(len(weight)):
        alone = fitted(weight[n : n + 1], H[n : n + 1])
        assert (alone.index_NOI[0] == together.index_NOI[n]).float().mean() > 0.99
        errors = output_error(alone, weight[n : n + 1], H[n : n + 1]), output_error(together, weight, H)[n : n + 1]
        assert torch.allclose(*errors, rtol=2e-3)


def test_the_fit_is_the_same_every_time():
    weight, H = problem(layers=1)
    first, second = fitted(weight, H), fitted(weight, H)
    assert torch.equal(first.index_NOI, second.index_NOI) and torch.equal(first.weight(), second.weight())


def test_a_weight_of_the_very_form_is_found_again():
    draw = torch.Generator().manual_seed(0)
    codebook = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    index = torch.randint(4, (1, 64, 128), generator=draw)
    S = (torch.rand(1, 64, 1, generator=draw) + 0.5) @ (torch.rand(1, 1, 128, generator=draw) / 4 + 1)
    weight = codebook[0][index] * S
    _, H = problem(layers=1, inputs=128)
    assert relative_error(fitted(weight, H, rank=1, rounds=8), weight, H) < 1e-6


def test_each_step_of_the_fit_lowers_the_output_error():
    weight, H = problem()
    h = importance(H)
    first = start(weight, h, 4, 4, kmeans.kmeans)
    later = first
    for _ in range(4):
        later = alternate(later, weight, h)
    compensated = Codebooks(
        assign.compensated(weight, later.scale(), later.codebook_NK, Factor.of(H)),
        later.codebook_NK,
        later.A_NOR,
        later.B_NRI,
    )
    last = refine(compensated, weight, Curvature(damp(H)))
    errors = [output_error(codebooks, weight, H) for codebooks in (first, later, compensated, last)]
    assert all((after < before).all() for before, after in pairwise(errors))
    assert torch.allclose(output_error(fitted(weight, H), weight, H), errors[-1], rtol=1e-2)


def test_sweeps_lower_the_output_error_and_never_raise_it():
    weight, H = problem()
    errors = [output_error(fitted(weight, H, sweeps=sweeps), weight, damp(H)) for sweeps in range(4)]
    assert all((after <= before * (1 + 1e-5)).all() for before, after in pairwise(errors))
    assert (errors[1] < 0.99 * errors[0]).all()


@pytest.mark.parametrize("seed", range(6))
def test_no_round_raises_the_weighted_error(seed):
    weight, H = problem(seed, outputs=24, inputs=40)
    h = importance(H)

    def error(codebooks: Codebooks):
        return (h[:, None] * (weight - codebooks.weight()).double().square()).sum((1, 2))

    codebooks = start(weight, h, 4, 3, kmeans.kmeans)
    for _ in range(6):
        better = alternate(codebooks, weight, h)
        assert (error(better) <= error(codebooks) * (1 + 1e-4)).all()
        codebooks = better


def test_over_relaxed_rounds_come_nearly_as_far_as_twice_as_many_to_the_minimum(monkeypatch):
    weight, H = problem(outputs=128, inputs=256)
    h = importance(H)

    def error_after(rounds, relaxation):
        monkeypatch.setattr("qat.quant.formats.codebook_fit.RELAXATION", relaxation)
        codebooks = start(weight, h, 4, 8, kmeans.kmeans)
        for _ in range(rounds):
            codebooks = alternate(codebooks, weight, h)
        return (h[:, None] * (weight - codebooks.weight()).square()).sum((1, 2))

    before, relaxed, twice = error_after(4, 1.0), error_after(4, RELAXATION), error_after(8, 1.0)
    assert (before - relaxed > 0.8 * (before - twice)).all()


def test_a_large_layer_has_its_codebook_fitted_to_a_sample(monkeypatch):
    weight, H = problem(layers=2, outputs=256)
    whole = fitted(weight, H)
    monkeypatch.setattr("qat.quant.formats.codebook_fit.SAMPLE", 96 * 128)
    assert sample(weight) == slice(None, None, 2)
    ratio = output_error(fitted(weight, H), weight, H) / output_error(whole, weight, H)
    assert (ratio < 1.1).all() and not torch.equal(ratio, torch.ones(2))


def watched(monkeypatch, module, name, objective):
    """The objective before and after each call of `name`, which changes some of the unknowns of `module`."""
    seen, original = [], getattr(module, name)

    def call(x, linear, weight, *rest):
        found = original(x, linear, weight, *rest)
        seen.append((objective(weight - linear.expand(x)), objective(weight - linear.expand(found))))
        return found

    monkeypatch.setattr(module, name, call)
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_in_float64_no_sub_step_of_a_round_raises_the_weighted_error(monkeypatch, seed):
    weight, H = problem(seed, outputs=24, inputs=40)
    h = importance(H)
    codebooks, weight, h = exact(start(weight, h, 4, 3, kmeans.kmeans)), weight.double(), h.double()

    def objective(error):
        return (h[:, None] * error.square()).sum((1, 2))

    seen = watched(monkeypatch, least_squares, "refit", objective)
    for _ in range(6):
        before = objective(weight - codebooks.weight())
        codebooks = alternate(codebooks, weight, h)
        codebook, rows = seen
        steps = [before, *codebook, *rows, objective(weight - codebooks.weight())]
        assert all((later <= earlier * (1 + 1e-12)).all() for earlier, later in pairwise(steps))
        seen.clear()
    assert codebooks.A_NOR.dtype == torch.float64


@pytest.mark.parametrize("seed", range(6))
def test_in_float64_no_sub_step_of_refinement_and_descent_raises_the_output_error(monkeypatch, seed):
    weight, H = problem(seed, outputs=24, inputs=40)
    codebooks, weight, H = exact(fitted(weight, H, rank=5, rounds=1)), weight.double(), H.double()
    seen = watched(monkeypatch, least_squares, "conjugate_gradient", Curvature(H).cost)
    for _ in range(3):
        before = output_error(codebooks, weight, H)
        index = assign.descended(weight, codebooks.scale(), codebooks.codebook_NK, Curvature(H), codebooks.index_NOI)
        codebooks = replace(codebooks, index_NOI=index)
        descended = output_error(codebooks, weight, H)
        codebooks = refine(codebooks, weight, Curvature(H))
        steps = [before, descended, *(error for pair in seen for error in pair), output_error(codebooks, weight, H)]
        assert len(seen) == 3  # A, B and the codebook
        assert all((later <= earlier * (1 + 1e-12)).all() for earlier, later in pairwise(steps))
        seen.clear()
    assert codebooks.A_NOR.dtype == torch.float64


@pytest.mark.parametrize("seed", range(6))
def test_refinement_never_raises_the_output_error(seed):
    weight, H = problem(seed, outputs=24, inputs=40)
    draw = torch.Generator().manual_seed(seed)
    anything = Codebooks(
        torch.randint(4, weight.shape, generator=draw).to(torch.uint8),
        torch.randn(3, 4, generator=draw).sort(1).values,
        torch.randn(3, 24, 5, generator=draw),
        torch.randn(3, 5, 40, generator=draw),
    )
    for codebooks in (anything, fitted(weight, H, rank=5, rounds=2)):
        refined = refine(codebooks, weight, Curvature(H))
        assert (output_error(refined, weight, H) <= output_error(codebooks, weight, H) * (1 + 1e-4)).all()


def test_refinement_moves_both_scales_and_the_codebook():
    weight, H = problem()
    before = alternate(start(weight, importance(H), 4, 4, kmeans.kmeans), weight, importance(H))
    after = refine(before, weight, Curvature(H))
    for name in ("A_NOR", "B_NRI", "codebook_NK"):
        assert not torch.allclose(getattr(after, name), getattr(before, name), rtol=1e-4), name
    assert torch.equal(after.index_NOI, before.index_NOI)


def test_refinement_puts_a_codebook_in_ascending_order_and_the_indices_with_it():
    weight, H = problem(layers=2, outputs=24, inputs=40)
    index = torch.where(weight > 0, 0, 1).to(torch.uint8)
    codebook = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    descending = Codebooks(index, codebook, torch.ones(2, 24, 1), torch.full((2, 1, 40), 0.01))
    refined = refine(descending, weight, Curvature(H))
    assert (refined.codebook_NK.diff(dim=1) > 0).all() and torch.equal(refined.index_NOI, 1 - index)
    assert (output_error(refined, weight, H) <= output_error(descending, weight, H)).all()


def test_importance_is_the_diagonal_relative_to_its_mean_within_a_factor_of_100():
    H = torch.diag_embed(torch.tensor([[0.0, 1.0, 2.0, 1.0]]))
    assert importance(H)[0].tolist() == pytest.approx([0.01, 1.0, 2.0, 1.0])
    spike = torch.diag_embed(torch.cat([torch.ones(1, 999), torch.full((1, 1), 1e9)], 1))
    assert importance(spike)[0, -1] == 100.0 and importance(spike)[0, 0] == pytest.approx(0.01)


@pytest.mark.parametrize("seen", [0, 1, 90])
def test_inputs_never_seen_give_finite_codebooks(seen):
    weight, H = problem(layers=2)
    H[:, seen:], H[:, :, seen:] = 0, 0
    codebooks = fitted(weight, H, sweeps=1)
    assert torch.isfinite(codebooks.weight()).all()
    assert (Curvature(torch.eye(96)[None]).cost(weight - codebooks.weight()) < weight.square().sum((1, 2))).all()


@pytest.mark.parametrize("zero", ["rows", "columns", "most"])
def test_weights_of_zero_give_finite_codebooks(zero):
    weight, H = problem(layers=2)
    if zero == "rows":
        weight[:, :7] = 0
    elif zero == "columns":
        weight[:, :, 10:40] = 0
    else:
        weight[:, 3:] = 0
    codebooks = fitted(weight, H, sweeps=1)
    assert torch.isfinite(codebooks.weight()).all() and torch.isfinite(codebooks.codebook_NK).all()
    assert (relative_error(codebooks, weight, H) < 0.5).all()


def test_fewer_inputs_than_ranks_is_fine():
    weight, H = problem(layers=2, outputs=10, inputs=6)
    codebooks = fitted(weight, H, rank=8, sweeps=1)
    assert torch.isfinite(codebooks.weight()).all() and (relative_error(codebooks, weight, H) < 0.1).all()
