"""Fused decoder layers against transformers' own in float64, gradients included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.decoder import Joint
from tests.devices import DEVICES

CHECK = """
import copy, os, sys
device = sys.argv[1]
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch, transformers
from torch import nn
import qat.decoder as decoder_module
from qat import rows as masks
from qat.decoder import Decoder, decoder
from qat.forward import FAST, FUSED, hidden_states, use
from qat.quant import adapter
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear
from qat.quant.weights import Weights

ERROR = 1e-5 if device == "cpu" else 5e-2
SIZES = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
}


def models(family, width=16):
    # the same model twice: exact, and in a type that the kernels take
    made, settings = FAMILIES[family]
    torch.manual_seed(0)
    exact = made(settings(**SIZES | {"head_dim": width})).eval()
    for name, parameter in exact.named_parameters():
        parameter.data.normal_(1, 0.3) if "norm" in name else parameter.data.mul_(8)
        parameter.data = parameter.data.bfloat16().float()
    exact.requires_grad_(False)
    model = copy.deepcopy(exact).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    use(model, FAST)
    return exact.double(), model


def quantize(model, mode):
    # Weights in place of layers that learn; transformers computes with the same ones.
    layers = {}
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            layer = QuantLinear(Codebook(2, 1), *module.weight.shape).to(device)
            layer.dense = module.weight.data
            model.set_submodule(name, layer)
            if mode in name or mode == "e2e":
                layers[name] = layer
    if not layers:
        return None, layers
    values = {name: layer.dense for name, layer in layers.items()}
    weights = Weights(list(layers.values()), model.lm_head.weight.dtype)
    for name, layer in layers.items():
        weights.value(layer).copy_(values[name])
    return weights, layers


def rows(joined, length=12):
    ids = torch.randint(60, (3, length))
    starts = torch.zeros(3, length, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    return masks.inputs(ids, starts if joined else None)


def near(one, other, what):
    away = (one.double().cpu() - other).norm() / other.norm()
    assert away < ERROR, (what, float(away))


def fuse(model, checkpointing):
    vars(model.base_model)[FUSED] = Decoder(model, checkpointing)
    if device == "cuda":
        assert decoder(model) is not None


def check(family, mode, joined, checkpointing, micro_batches=1, length=12, width=16):
    exact, model = models(family, width)
    weights, layers = quantize(model, mode)
    given = rows(joined, length)
    fuse(model, checkpointing)
    weights.begin(micro_batches)
    weights.clear()
    leaves = {name: exact.get_submodule(name).weight.requires_grad_() for name in layers}
    for _ in range(micro_batches):
        wanted = hidden_states(exact, given)
        found = hidden_states(model, {name: value.to(device) for name, value in given.items()})
        near(found, wanted, "hidden states")
        grad = torch.randn_like(wanted)
        wanted.backward(grad)
        found.backward(grad.to(found))
    for name, layer in layers.items():
        near(weights.sum(layer), leaves[name].grad, name)
        assert layer.dense.grad is None


def check_adapters(family, checkpointing):
    # Adapters of some layers on a frozen student: of one in a joint product, of all in another, of none in a third.
    exact, model = models(family)
    _, layers = quantize(model, "none")
    chosen = [name for name, part in model.named_modules() if name.endswith(("q_proj", "gate_proj", "up_proj"))]
    leaves = {}
    for number, name in enumerate(chosen):
        layer, random = model.get_submodule(name), torch.Generator().manual_seed(number)
        adapter.put(layer, 2, 6.0).draw(random)
        with torch.no_grad():
            layer.adapter.B.copy_(torch.randn(layer.adapter.B.shape, generator=random) * 0.3)
        leaves[name] = [part.detach().double().cpu().requires_grad_() for part in (layer.adapter.A, layer.adapter.B)]
    weights = {name: exact.get_submodule(name).weight + 3 * B @ A for name, (A, B) in leaves.items()}
    for name, weight in weights.items():
        module = exact.get_submodule(name)
        del module._parameters["weight"]
        module.weight = weight
    given = rows(True)
    fuse(model, checkpointing)
    wanted = hidden_states(exact, given)
    found = hidden_states(model, {name: value.to(device) for name, value in given.items()})
    near(found, wanted, "hidden states with adapters")
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    found.backward(grad.to(found))
    for name, pair in leaves.items():
        for part, leaf in zip(model.get_submodule(name).adapter.parameters(), pair, strict=True):
            near(part.grad, leaf.grad, name)


def check_teacher(family, joined):
    exact, model = models(family)
    given = rows(joined)
    fuse(model, False)
    with torch.inference_mode():
        found = hidden_states(model, {name: value.to(device) for name, value in given.items()})
    near(found, hidden_states(exact, given), "teacher")
    vars(model.base_model)[FUSED] = None
    near(hidden_states(model, {name: value.to(device) for name, value in given.items()}), found.double().cpu(), "views")


check("qwen3", "e2e", False, False)
check("qwen3", "mlp", True, True, 2)
check("llama", "e2e", True, False, 2)
check("llama", "attn", False, False)
for length, width in ((65, 128), (128, 64), (128, 128)):
    check("qwen3", "e2e", True, False, length=length, width=width)
decoder_module.LONGEST = 7
check("qwen3", "e2e", True, True)
check("llama", "attn", False, False)
decoder_module.LONGEST = 128
if device == "cuda":
    check("qwen3", "e2e", True, False, length=300, width=128)
    check("llama", "e2e", False, False, length=260, width=64)
check_adapters("llama", False)
check_adapters("qwen3", True)
check_teacher("qwen3", True)
check_teacher("llama", False)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_fused_layers_are_those_of_transformers(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_of_a_joint_product_move_once_and_never_again():
    """Recorded graphs hold on to where weights lie: a second decoder of one model must not take them away."""
    layers = [nn.Linear(6, outputs, bias=False).requires_grad_(False) for outputs in (4, 2, 3)]
    before = [layer.weight.clone() for layer in layers]
    joint = Joint(layers).weight
    assert torch.equal(joint, torch.cat(before))
    places = [layer.weight.data_ptr() for layer in layers]
    again = Joint(layers).weight
    assert again.data_ptr() == joint.data_ptr() == places[0] and torch.equal(again, joint)
    assert [layer.weight.data_ptr() for layer in layers] == places
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_weights_of_one_storage_that_do_not_follow_one_another_are_joined_anew():
    storage = torch.randn(5, 6)
    layers = [nn.Linear(6, len(rows), bias=False).requires_grad_(False) for rows in (storage[:2], storage[3:])]
    layers[0].weight.data, layers[1].weight.data = storage[:2], storage[3:]
    assert torch.equal(Joint(layers).weight, storage[[0, 1, 3, 4]])
    assert torch.equal(Joint(layers[::-1]).weight, storage[[3, 4, 0, 1]])
