"""The fit of k-quants: scales that are themselves rounded, and a cost that falls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.quant.curvature import Curvature, Factor
from qat.quant.fit import Problem, fit, importance
from qat.quant.formats import KQuant
from tests.quant.test_curvature import problem

BITS = (2, 3, 4, 5, 6)
every = pytest.mark.parametrize("bits", BITS)


def weight_of(format, made):
    return format.weight(made.index_NOI, format.stored(made.operands))


def cost(weight, made, H, G=None):
    """In float64, of what a file would hold."""
    return Curvature(H.double(), None if G is None else G.double()).cost((weight - made).double())


@every
def test_rounded_scales_are_nearly_as_good_as_free_ones(bits, monkeypatch):
    weight, H, _ = problem(0, outputs=24, inputs=512)
    format, h = KQuant(bits), importance(H)
    made = format.start(weight, h, None)
    monkeypatch.setattr(KQuant, "_whole", lambda self, codes: codes)  # codes as they would be without rounding
    free = format.alternated(made, weight, h)
    left, best = ((weight - format.grid(one.operands).at(one.index_NOI)).norm() for one in (made, free))
    assert left < (1.15 if bits == 2 else 1.1) * best


@every
def test_a_weight_of_the_very_form_is_found_again(bits):
    format, draw = KQuant(bits), torch.Generator().manual_seed(bits)
    index = torch.randint(2**bits, (1, 8, 256), generator=draw).to(torch.uint8)
    size = format.layout.group
    index[:, :, ::size], index[:, :, 1::size] = 0, 2**bits - 1  # groups use their range
    low, high = format.layout.codes
    codes = [torch.randint(max(low, high // 2), high + 1, (1, 8, 256 // size), generator=draw).float() for _ in "sm"]
    supers = [(torch.rand(1, 8, 1, generator=draw) + 0.5).half().float() for _ in "sm"]
    names = list(format.parts(8, 256))
    operands = dict(zip(names, [supers[0], codes[0], supers[1], codes[1]], strict=False))
    weight = format.grid(operands).at(index)
    H = torch.eye(256)[None]
    made = fit(Problem(weight, H, Factor.of(H)), format, None, rounds=6, sweeps=1)
    assert (weight_of(format, made) - weight).norm() < 3e-2 * weight.norm()


@given(st.integers(0, 1000), st.sampled_from(BITS), st.booleans())
def test_refinement_never_raises_the_cost(seed, bits, coupled):
    weight, H, G = problem(seed, outputs=10, inputs=256)
    format, posed = KQuant(bits), Problem(weight, H, Factor.of(H), G if coupled else None)
    first = posed.enter(format, format.start(weight, importance(H), None))
    refined = format.refined(first, posed.weight_NOI, posed.curvature)
    curvature = posed.curvature
    before, after = (
        cost(posed.weight_NOI, format.grid(one.operands).at(one.index_NOI), curvature.inputs_NII, curvature.outputs_NOO)
        for one in (first, refined)
    )
    assert (after <= before * (1 + 1e-5)).all()


@every
def test_the_whole_fit_costs_far_less_than_nearest_values(bits):
    weight, H, _ = problem(1, outputs=16, inputs=256)
    format = KQuant(bits)
    nearest = format.start(weight, importance(H), None)
    made = fit(Problem(weight, H, Factor.of(H)), format, None, rounds=4, sweeps=1)
    before, after = (cost(weight, weight_of(format, one), H) for one in (nearest, made))
    assert (after < 0.8 * before).all()


@pytest.mark.parametrize("what", ["rows", "block"])
def test_zeros_give_finite_weights(what):
    weight, H, _ = problem(0, outputs=6, inputs=512)
    if what == "rows":
        weight[:, :3] = 0
    else:
        weight[:, :, 256:] = 0
    made = fit(Problem(weight, H, Factor.of(H)), KQuant(2), None, rounds=2, sweeps=1)
    found = weight_of(KQuant(2), made)
    assert torch.isfinite(found).all() and (found - weight).norm() < weight.norm()
