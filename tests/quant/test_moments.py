import pytest
import torch

from qat.errors import NumericsError
from qat.quant.layers import select
from qat.quant.moments import second_moments
from tests import tiny


def sources(model) -> list[str]:
    return list({layer.source: None for layer in select(model, tiny.QUANT)})


def exact_moments(model, names, rows):
    """From the captured inputs of one pass over all rows, in float64."""
    seen = {}

    def capture(name):
        return lambda module, arguments: seen.update({name: arguments[0].detach().double().flatten(0, 1)})

    hooks = [model.get_submodule(name).register_forward_pre_hook(capture(name)) for name in names]
    model(rows)
    for hook in hooks:
        hook.remove()
    return {name: torch.einsum("ti,tj->ij", x, x) / len(x) for name, x in seen.items()}


@pytest.mark.parametrize("micro_batch", [3, 16])
def test_moments_are_the_mean_products_of_the_inputs(model, rows, micro_batch):
    names = sources(model)
    found = second_moments(model, names, rows, micro_batch)
    expected = exact_moments(model, names, rows)
    assert set(found) == set(names) and len(names) == 8
    for name in names:
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-3, atol=1e-5 * expected[name].max()), name


def test_layers_that_share_a_source_do_see_the_same_input(model, rows):
    layers = select(model, tiny.QUANT)
    inputs = exact_moments(model, [layer.name for layer in layers], rows)
    assert all(torch.equal(inputs[layer.name], inputs[layer.source]) for layer in layers)


def test_the_model_is_left_without_hooks_and_moments_can_be_written_to(model, rows):
    names = sources(model)
    found = second_moments(model, names, rows, 8)
    assert not any(model.get_submodule(name)._forward_pre_hooks for name in names)
    found[names[0]].add_(1.0)


def test_a_bf16_model_gives_fp32_moments(teacher, rows):
    model = teacher.load(torch.bfloat16, tiny.CPU)
    names = sources(model)
    for name, moment in second_moments(model, names, rows, 8).items():
        assert moment.dtype == torch.float32, name


def test_inputs_that_are_not_finite_are_refused_and_the_hooks_removed(teacher, rows):
    model = teacher.load(torch.float32, tiny.CPU)
    model.model.embed_tokens.weight[rows[0, 0]] = float("nan")
    names = sources(model)
    with pytest.raises(NumericsError, match=names[0]):
        second_moments(model, names, rows, 8)
    assert not model.get_submodule(names[0])._forward_pre_hooks
