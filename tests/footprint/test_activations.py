"""What a decoder layer is said to keep of a token is what autograd keeps, to the byte."""

from dataclasses import replace

import pytest
import torch

from qat.config import Packing
from qat.decoder import LONGEST, Decoder, attention, kernels, long
from qat.footprint import Shapes
from qat.footprint.activations import kept
from qat.forward import FUSED, prepare
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear
from qat.quant.weights import Weights
from tests import tiny
from tests.footprint.saved import FAMILIES, LENGTH, ROWS, TOKENS, inputs, kept_bytes, model


def shapes_of(family):
    made = model(family, 2)
    return Shapes.of(made, made.config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", list(Packing))
def test_transformers_own_layers(family, dtype, packing):
    machine = replace(tiny.FP32, dtype=dtype)
    given = inputs(packing is Packing.joined)
    one, two = (kept_bytes(model(family, layers, dtype), given) for layers in (1, 2))
    assert two - one == TOKENS * kept(shapes_of(family), machine, LENGTH, packing, again=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_computed_again(family):
    found = []
    for layers in (2, 3):
        made = model(family, layers)
        prepare(made, compiled=False, checkpointing=True)
        found.append(kept_bytes(made, inputs(False)))
    assert found[1] - found[0] == TOKENS * kept(shapes_of(family), tiny.FP32, LENGTH, Packing.rows, again=True)


@pytest.fixture
def unkernelled(monkeypatch):
    """Kernels replaced by tensors of the shapes that they give: what is kept does not depend on their numbers."""

    def norm(x, more, weight, epsilon):
        return x if more is None else torch.zeros_like(x), torch.zeros_like(x)

    def attend(qkv, places, norms, heads):
        return qkv.new_zeros(len(qkv), heads.query * heads.width)

    monkeypatch.setattr(kernels, "norm", norm)
    monkeypatch.setattr(kernels, "gate", lambda both: both.new_zeros(len(both), both.shape[1] // 2))

    def attend_long(qkv, places, norms, heads):
        return attend(qkv, places, norms, heads), torch.zeros(ROWS, heads.query, len(qkv) // ROWS)

    monkeypatch.setattr(attention, "forward", attend)
    monkeypatch.setattr(long, "forward", attend_long)


@pytest.mark.parametrize("length", [LENGTH, LONGEST + 2])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers(family, again, length, unkernelled):
    found = []
    for layers in (2, 3):
        made, learning = model(family, layers, torch.bfloat16), []
        for name in [name for name, _ in made.named_modules() if name.endswith("_proj")]:
            learning.append(QuantLinear(Codebook(2, 1), *made.get_submodule(name).weight.shape))
            made.set_submodule(name, learning[-1])
        made.requires_grad_(False)
        weights = Weights(learning, made.dtype)
        vars(made.base_model)[FUSED] = Decoder(made, again)
        found.append(kept_bytes(made, inputs(False, length), [weights.values]))
    machine = replace(tiny.FP32, device=torch.device("cuda"), dtype=torch.bfloat16, compile=True)
    tokens = ROWS * (length - 1)
    assert found[1] - found[0] == tokens * kept(shapes_of(family), machine, length, Packing.rows, again)


def test_what_is_fused():
    machine = replace(tiny.FP32, device=torch.device("cuda"), dtype=torch.bfloat16, compile=True)
    shapes = shapes_of("qwen3")
    assert shapes.fuses(machine)
    assert not shapes.fuses(replace(machine, dtype=torch.float32))
    assert not shapes.fuses(replace(machine, compile=False))
    assert not shapes.fuses(replace(machine, device=torch.device("cpu")))
