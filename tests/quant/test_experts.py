"""Experts as layers of their own compute what their stacks compute, and learn what these would learn."""

import pytest
import torch
import transformers

from qat.quant.experts import parsed
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear, baked, quantized
from qat.quant.places import matrix, place, places, put
from qat.quant.weights import Weights

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
IDS = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
KINDS = ["Mixtral", "GptOss", "Llama4Text"]  # a plain stack, a transposed one with biases, one that is all multiplied


def model_of(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data.normal_(std=0.3)
    return model.requires_grad_(False)


def experts_of(model):
    return {name: one for name, one in places(model).items() if ".experts." in name}


def quantize(model, names):
    """Puts layers with numbers of their own where matrices are."""
    draw = torch.Generator().manual_seed(2)
    for name in names:
        layer = QuantLinear(Codebook(2, 2), *place(model, name).shape)
        layer.indices.random_(4, generator=draw)
        layer.set_parts({name: torch.randn(part.shape, generator=draw) for name, part in layer.parts().items()})
        put(model, name, layer.requires_grad_(False))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some", [False, True])
def test_opened_stacks_compute_what_dense_ones_do(kind, some):
    """Whichever way transformers multiplies, and where a part of the experts stays dense."""
    model, dense = model_of(kind), model_of(kind)
    names = [name for name in experts_of(model) if not some or ".1." in name]
    quantize(model, names)
    for name, layer in quantized(model).items():
        matrix(dense, name).copy_(layer.weight(torch.float32))
    ways = ["eager"] if kind == "Llama4Text" else ["eager", "grouped_mm", "batched_mm"]
    for way in ways:
        for one in (model, dense):
            one.config._experts_implementation = way
        expected = logits(dense)
        assert torch.allclose(logits(model), expected, atol=1e-4)
        with baked(model, torch.float32), torch.inference_mode():
            assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
            assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
        assert all(layer.dense is None for layer in quantized(model).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_of_experts_are_those_of_their_stacks(kind, micro_batches):
    model, dense = model_of(kind), model_of(kind).double()
    dense.config._experts_implementation = "eager"  # grouped products have no float64
    quantize(model, experts_of(model))
    layers = quantized(model)
    weights = Weights(list(layers.values()), torch.float32)
    for layer in layers.values():
        weights.value(layer).copy_(layer.weight(torch.float32))
    weights.begin(micro_batches)
    weights.clear()
    for name, layer in layers.items():
        matrix(dense, name).copy_(layer.weight(torch.float64))
    stacks = [parameter for name, parameter in dense.named_parameters() if ".experts." in name and parameter.dim() == 3]
    for parameter in stacks:
        parameter.requires_grad_()
    for part in IDS.chunk(micro_batches):
        model(part, use_cache=False).logits.square().sum().backward()
        dense(part, use_cache=False).logits.square().sum().backward()
    for name, layer in layers.items():
        owner, number, parameter = parsed(name)
        expected = dense.get_parameter(f"{owner}.{parameter}").grad[number]
        expected = expected.mT if expected.shape != weights.sum(layer).shape else expected
        assert torch.allclose(weights.sum(layer).double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_matrices_of_experts_are_views():
    model = model_of("GptOss")
    name = "model.layers.1.mlp.experts.2.down_proj"
    assert place(model, name).shape == (16, 12)
    matrix(model, name).fill_(7)
    assert (model.get_parameter("model.layers.1.mlp.experts.down_proj")[2] == 7).all()
    assert place(model, "model.layers.1.mlp.experts.3.down_proj") is None
    assert place(model, "model.layers.1.mlp.experts.2.bias") is None


def test_learning_weights_lie_side_by_side_and_are_not_copied():
    model = model_of("Mixtral")
    quantize(model, experts_of(model))
    weights = Weights(list(quantized(model).values()), torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.untyped_storage().data_ptr() == weights.values.untyped_storage().data_ptr()
    assert experts.gate_up_proj is experts.gate_up_proj and experts.gate_up_proj.is_leaf
