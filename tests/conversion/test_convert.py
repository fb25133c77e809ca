from functools import partial

import pytest
import torch
from torch import nn

from qat.cache.batch import Text
from qat.config import ConvertConfig, KMeansBackend, KMeansConfig
from qat.conversion.convert import Held, convert, install, quantize, stacks, workspace
from qat.conversion.moments import Moments, gather
from qat.errors import NumericsError
from qat.evaluate import evaluate
from qat.quant.architectures import Layer, select
from qat.quant.curvature import damp
from qat.quant.formats import Codebook
from qat.quant.places import matrix
from tests import tiny

EXACT = KMeansConfig("exact", KMeansBackend.exact)


@pytest.fixture(scope="module")
def made(model, rows):
    return tiny.converted(model, rows)


def test_every_layer_is_handed_over_in_its_form(model, made):
    assert len(made) == 14
    for layer, module, _ in made.values():
        assert (
            module.format == layer.format
            and module.indices.shape == layer.shape == model.get_submodule(layer.name).weight.shape
        )
        assert module.codebook.shape == (2**layer.format.bits,) and (module.codebook.diff() >= 0).all()
        assert torch.allclose(module.scale_A.norm(dim=0), torch.ones(layer.format.rank), atol=1e-5)
        assert torch.allclose(module.scale_B.norm(dim=1), torch.ones(layer.format.rank), atol=1e-5)


@torch.inference_mode()
def test_the_errors_are_those_of_the_modules(model, rows, made):
    moments = gather(model, [layer for layer, _, _ in made.values()], Text(rows).batches(8))
    for layer, module, errors in made.values():
        W, H = model.get_submodule(layer.name).weight.double(), damp(moments.inputs[layer.source].double()[None])[0]
        E = W - module.weight(torch.float32).double()
        assert errors["weight_error"] == pytest.approx(float((E**2).sum() / (W**2).sum()), rel=1e-3)
        output = float(torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T))
        assert errors["output_error"] == pytest.approx(output, rel=1e-2)


def test_four_bits_are_closer_than_two_and_both_far_from_nothing(made):
    worst = {
        kind: max(e["output_error"] for layer, _, e in made.values() if layer.role == kind) for kind in ("mlp", "attn")
    }
    assert worst["attn"] < 0.02 and worst["mlp"] < 0.15


def test_the_model_is_not_changed(teacher, model, rows):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny.converted(model, rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_codebooks_do_not_depend_on_how_layers_are_stacked(monkeypatch, model, rows, made):
    monkeypatch.setattr("qat.conversion.convert.STACK_BYTES", {"cpu": 1})
    for name, (_, module, errors) in tiny.converted(model, rows).items():
        assert errors["output_error"] == pytest.approx(made[name][2]["output_error"], rel=0.02)
        assert (module.indices == made[name][1].indices).float().mean() > 0.98


def test_the_package_backend_makes_codebooks_of_like_quality(model, rows, made):
    other = tiny.converted(model, rows, KMeansBackend.kmeans_pytorch)
    total = [sum(errors["output_error"] for _, _, errors in each.values()) for each in (made, other)]
    assert total[1] < 1.5 * total[0]


def test_biases_stay_with_their_layers():
    model, attention = nn.Module(), nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].self_attn, attention.q_proj = attention, nn.Linear(16, 8)
    bias = attention.q_proj.bias
    moments = Moments({"layers.0.self_attn.q_proj": torch.eye(16)})
    settings = ConvertConfig(rounds=1, sweeps=1)
    (made,) = quantize(select(model, tiny.QUANT), lambda _: attention.q_proj.weight, moments, settings, EXACT, tiny.CPU)
    install(model, {made.layer.name: made.module})
    assert attention.q_proj is made.module and attention.q_proj.bias is bias


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "are all zero"), (float("nan"), "NaN or infinity"), (-float("inf"), "NaN or infinity")]
)
def test_a_layer_that_no_codebook_can_stand_for_is_refused_by_name(teacher, rows, value, said):
    model = teacher.load(torch.float32, tiny.CPU)
    layers = select(model, tiny.QUANT)
    moments = gather(model, layers, Text(rows).batches(8))
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    weight.zero_() if value == 0 else weight[3, 5].fill_(value)
    with pytest.raises(NumericsError, match=rf"^model\.layers\.1\.mlp\.up_proj cannot be quantized.*{said}"):
        quantize(layers, lambda name: model.get_submodule(name).weight, moments, ConvertConfig(), EXACT, tiny.CPU)


def test_stacks_hold_layers_of_one_form_up_to_a_size():
    def layer(name: str, shape=(4, 8), bits=2, rank=1) -> Layer:
        return Layer(name, "mlp", shape, Codebook(bits, rank))

    layers = [layer("a"), layer("b", shape=(8, 4)), layer("c"), layer("d", bits=4), layer("e", rank=2), layer("f")]
    names = [[member.name for member in stack] for stack in stacks(layers, 2 * workspace(layers[0]))]
    assert names == [["a", "c"], ["f"], ["b"], ["d"], ["e"]]
    assert [len(stack) for stack in stacks(layers, 1)] == [1] * 6


def test_a_second_pass_starts_from_the_first_and_pays_where_inputs_are_those_of_the_quantized_model(teacher, rows):
    first = conversion(teacher, rows, passes=1)
    second = conversion(teacher, rows, passes=2)
    student = teacher.load(torch.float32, tiny.CPU)
    install(student, first)
    layers = select(teacher.skeleton(), tiny.QUANT)
    moments = gather(student, layers, Text(rows).batches(8))
    for kind in ("mlp", "attn"):
        before, after = (
            sum(cost(teacher, one, made.get(one), moments.inputs[one.source]) for one in layers if one.role == kind)
            for made in (first, second)
        )
        assert after < before


def conversion(teacher, rows, passes):
    model = teacher.load(torch.float32, tiny.CPU)
    held = [Held() for _ in range(passes)]

    def load(shelf):
        made = teacher.load(torch.float32, tiny.CPU)
        install(made, shelf or {})
        return made

    settings = ConvertConfig(gradients=False, passes=passes, rounds=2, sweeps=1)
    weights, text = partial(matrix, model), Text(rows).batches(4)
    convert(select(model, tiny.QUANT), load, weights, text, settings, EXACT, tiny.CPU, held)
    return held[-1]


def cost(teacher, layer, module, H):
    weight = matrix(teacher.load(torch.float32, tiny.CPU), layer.name)
    error = (weight - module.weight(torch.float32)).double()
    return float(torch.trace(error @ H.double() @ error.T))


def test_gradients_bring_the_whole_model_closer_to_the_teacher(teacher, rows):
    held_out = torch.randint(256, (64, 24), generator=torch.Generator().manual_seed(1))
    calibration = torch.randint(256, (64, 24), generator=torch.Generator().manual_seed(2))
    exact, kl = teacher.load(torch.float32, tiny.CPU), {}
    layers = select(exact, tiny.QUANT)
    for gradients in (False, True):
        moments = gather(exact, layers, Text(calibration).batches(8), gradients)
        settings = ConvertConfig(rounds=4, sweeps=2)
        made = quantize(layers, lambda name: exact.get_submodule(name).weight, moments, settings, EXACT, tiny.CPU)
        student = teacher.load(torch.float32, tiny.CPU)
        install(student, {one.layer.name: one.module for one in made})
        kl[gradients] = evaluate(student, exact, Text(held_out), 8, tiny.FP32).kl
    assert kl[True] < kl[False]
