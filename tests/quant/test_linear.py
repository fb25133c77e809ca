import pytest
import torch
from torch import nn

from qat.quant import linear
from qat.quant.formats import Codebook, Grid, GroupGrid
from qat.quant.linear import QuantLinear, baked, quantized

PARAMETERS = ("codebook", "scale_A", "rank_magnitude", "scale_B")


def layer(outputs=6, inputs=10, bits=2, rank=3, bias=False, seed=0) -> QuantLinear:
    draw = torch.Generator().manual_seed(seed)
    module = QuantLinear(Codebook(bits, rank), outputs, inputs, torch.randn(outputs, generator=draw) if bias else None)
    module.indices.copy_(torch.randint(2**bits, (outputs, inputs), generator=draw))
    with torch.no_grad():
        for name in PARAMETERS:
            parameter = getattr(module, name)
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return module


@torch.no_grad()
def gradients(module: QuantLinear, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of the parts from that of the weight, as a stack makes them."""
    parts = module.parts()
    operands = module.format.operands(parts)
    found = {name: torch.empty_like(part) for name, part in parts.items()}
    of_operands = module.format.gradients(grad, module.indices, operands)
    module.format.distribute(of_operands, parts, found)
    return found | {name: value for name, value in of_operands.items() if name in parts}


def exact(module: QuantLinear) -> dict[str, torch.Tensor]:
    return {name: getattr(module, name).detach().double().requires_grad_() for name in PARAMETERS}


def exact_weight(module: QuantLinear, p: dict[str, torch.Tensor]) -> torch.Tensor:
    return p["codebook"][module.indices.long()] * ((p["scale_A"] * p["rank_magnitude"]) @ p["scale_B"])


@pytest.mark.parametrize(("bits", "rank"), [(1, 1), (2, 3), (4, 8)])
def test_gradients_are_those_of_the_plain_formula(bits, rank):
    module = layer(outputs=17, inputs=23, bits=bits, rank=rank)
    grad = torch.randn(17, 23, generator=torch.Generator().manual_seed(1))
    p = exact(module)
    (exact_weight(module, p) * grad.double()).sum().backward()
    found = gradients(module, grad)
    for name in PARAMETERS:
        expected = p[name].grad
        assert torch.allclose(found[name].double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max()), name


def test_an_entry_that_no_index_uses_gets_no_gradient():
    module = layer()
    module.indices[module.indices == 1] = 3
    d_codebook = gradients(module, torch.ones(6, 10))["codebook"]
    assert d_codebook[1] == 0 and d_codebook[3] != 0


def test_the_nearest_entry_is_found_in_a_codebook_of_any_order():
    draw = torch.Generator().manual_seed(0)
    latent, scale = (torch.randn(20, 30, generator=draw) for _ in range(2))
    codebook = torch.tensor([0.5, -2.0, 1.5, -0.1])
    found = (latent - codebook[Grid(codebook, scale).nearest(latent).long()] * scale).abs()
    best = (latent[..., None] - codebook * scale[..., None]).abs().min(-1).values
    assert torch.allclose(found, best, atol=1e-6)


def test_the_output_is_the_sum_over_ranks():
    module = layer(bias=True)
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    p = exact(module)
    codebook = p["codebook"][module.indices.long()]
    y = module.bias.double() + sum(
        p["rank_magnitude"][r] * p["scale_A"][:, r] * ((x.double() * p["scale_B"][r]) @ codebook.T) for r in range(3)
    )
    assert torch.allclose(module(x).double(), y, rtol=1e-4, atol=1e-4)


def test_in_bf16_the_weight_is_rounded_once():
    module = layer()
    assert torch.equal(module.weight(torch.bfloat16), module.weight(torch.float32).bfloat16())
    assert module(torch.randn(3, 10).bfloat16()).dtype == torch.bfloat16


def test_a_baked_layer_keeps_its_weight_until_it_is_unbaked():
    module, x = layer(), torch.randn(3, 10)
    before = module(x).detach()
    module.bake(torch.float32)
    with torch.no_grad():
        module.codebook.mul_(2)
    assert torch.equal(module(x), before) and not module(x).requires_grad
    module.unbake()
    assert torch.allclose(module(x), 2 * before, rtol=1e-4)


def test_baked_gives_the_same_outputs_and_leaves_layers_as_it_found_them():
    model = nn.Sequential(layer(seed=1), layer(outputs=4, inputs=6, seed=2))
    model[1].bake(torch.float32)
    x = torch.randn(3, 10)
    plain, kept = model(x), model[1].dense
    with baked(model, torch.float32):
        assert torch.equal(model(x), plain) and model[0].dense is not None
    assert model[0].dense is None and model[1].dense is kept


def test_baked_ends_with_an_error_too():
    model = nn.Sequential(layer())
    with pytest.raises(RuntimeError), baked(model, torch.float32):
        raise RuntimeError
    assert model[0].dense is None


def test_normalized_scales_have_unit_norms_and_give_the_same_weight():
    module = layer(outputs=20, inputs=30)
    parts = module.normalized()
    assert torch.allclose(parts["scale_A"].norm(dim=0), torch.ones(3))
    assert torch.allclose(parts["scale_B"].norm(dim=1), torch.ones(3))
    weight = module.weight(torch.float32)
    module.set_parts(parts)
    assert torch.allclose(module.weight(torch.float32), weight, rtol=1e-4, atol=1e-5)


def test_an_idle_rank_is_normalized_to_zero():
    module = layer()
    with torch.no_grad():
        module.scale_A[:, 1] = 0
        module.scale_B[1] = 0
    parts, weight = module.normalized(), module.weight(torch.float32)
    assert all(torch.isfinite(part).all() for part in parts.values())
    module.set_parts(parts)
    assert torch.allclose(module.weight(torch.float32), weight, atol=1e-5)


def test_normalizing_changes_nothing_in_the_layer_itself():
    module = layer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.normalized()["codebook"].zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_quantized_layers_are_found_by_name_in_order():
    model = nn.Sequential(layer(), nn.Linear(6, 6), nn.Sequential(layer(inputs=6)))
    assert list(quantized(model)) == ["0", "2.0"]


@pytest.mark.parametrize("format", [Codebook(2, 3), GroupGrid(4, 5, "shifted")])
def test_a_large_weight_is_computed_some_rows_at_a_time(monkeypatch, format):
    module = QuantLinear(format, 7, 10)
    draw = torch.Generator().manual_seed(0)
    module.indices.copy_(torch.randint(2**format.bits, (7, 10), generator=draw))
    module.set_parts({name: torch.randn(part.shape, generator=draw) for name, part in module.parts().items()})
    whole = module.weight(torch.float32)
    monkeypatch.setattr(linear, "TOGETHER", 20)
    assert torch.allclose(module.weight(torch.float32), whole, rtol=1e-6, atol=1e-7)
    assert module.weight(torch.bfloat16).dtype == torch.bfloat16
