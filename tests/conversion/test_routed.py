"""The moments of experts are of the tokens that are sent to them; the code of their classes says which."""

import pytest
import torch
import torch.nn.functional as F

from qat.cache.batch import Text
from qat.config import QuantConfig, WeightConfig
from qat.conversion import routed
from qat.conversion.moments import gather
from qat.conversion.observer import Observer
from qat.quant.architectures import select
from qat.quant.linear import quantized
from tests.quant.test_experts import IDS, experts_of, model_of, quantize

QUANT = QuantConfig("q2a2", mlp=WeightConfig(2, 2), attn=WeightConfig(2, 2))


def sent(model):
    """What each expert of the lowest block is given, and what it makes of it inside, by hand."""
    block, seen = model.model.layers[0].mlp, {}
    hook = block.experts.register_forward_pre_hook(lambda _, given: seen.update(given=given))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    states, index, _ = seen["given"]
    inputs, inner = {}, {}
    for number in range(3):
        x = inputs[number] = states[(index == number).any(-1)].double()
        gate, up = (x @ block.experts.gate_up_proj[number].double().T).chunk(2, -1)
        inner[number] = F.silu(gate) * up
    return {"gate_up_proj": inputs, "down_proj": inner}


@pytest.mark.parametrize("opened", [False, True])
def test_inputs_are_those_of_the_tokens_that_were_sent(opened, monkeypatch):
    monkeypatch.setattr(routed, "_inputs", lambda *_: 0)  # nothing is filled in
    model = model_of("Mixtral")
    layers = select(model, QUANT)
    if opened:
        quantize(model, experts_of(model))
    found, whole = gather(model, layers, Text(IDS).batches(2)).inputs, 0
    for parameter, experts in sent(model).items():
        for number, x in experts.items():
            name = f"model.layers.0.mlp.experts.{number}.{parameter}"
            assert torch.allclose(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            whole += len(x)
    assert whole == 2 * 2 * IDS.numel()


@pytest.fixture
def added(monkeypatch):
    """What goes into sums, by its key: vectors and their weights."""
    found, original = {}, Observer._add

    def add(self, key, x, weight=None):
        found[key] = (x, weight)
        original(self, key, x, weight)

    monkeypatch.setattr(Observer, "_add", add)
    return found


@pytest.mark.parametrize("kind", ["Mixtral", "Llama4Text"])
def test_each_input_has_the_weight_of_the_gradient_that_meets_it(kind, added):
    model = model_of(kind)
    gather(model, select(model, QUANT), Text(IDS).batches(2), gradients=True)
    names = [name for name in experts_of(model) if (name, True) in added]
    assert len(names) >= 6
    for name in names:
        (g, _), (x, weight) = added[name, True], added[name, False]
        assert len(g) == len(x) > 0 and (x.abs().sum(-1) > 0).all()
        assert torch.allclose(weight, g.double().square().mean(-1).sqrt().float(), rtol=1e-4)


def test_gradients_at_an_expert_are_those_behind_the_block_times_its_share(added):
    """As the block's class adds up its experts: their outputs times what the router gives them."""
    model, seen = model_of("Mixtral"), {}

    def remember(_, given, output):
        seen["given"] = given
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update(gradient=gradient))

    hook = model.model.layers[0].mlp.experts.register_forward_hook(remember)
    gather(model, select(model, QUANT), Text(IDS).batches(2), gradients=True)
    hook.remove()
    _, index, shares = seen["given"]
    for number in range(3):
        place, token = torch.where((index == number).T)  # the order in which the class takes them
        expected = seen["gradient"][token] * shares[token, place, None]
        assert torch.allclose(added[f"model.layers.0.mlp.experts.{number}.down_proj", True][0], expected, atol=1e-9)


def test_an_expert_without_tokens_gets_what_its_block_has_in_common():
    """By hand, for three experts of which one met all tokens that it needs, one some and one none."""
    draw = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(9, 4, generator=draw), "b": torch.randn(1, 4, generator=draw)}
    for parameter in ("gate_up_proj", "down_proj"):
        moments = {(name, False): x.T @ x / len(x) for name, x in rows.items()}
        moments |= {("a", True): torch.ones(2, 2)}
        met = {("a", False): 9, ("b", False): 1, ("a", True): 9}
        weights = {("a", False): 9.0, ("b", False): 1.0}
        stack = routed.Routed(parameter, ["a", "b", "c"], ["a", "b", "c"])
        routed.complete([stack], moments, weights, met, 20)
        both = torch.cat(list(rows.values()))
        shared = both.T @ both / 10
        if parameter == "down_proj":
            shared = shared.trace() / 4 * torch.eye(4)
        x, y = rows["a"], rows["b"]
        assert torch.allclose(moments["a", False], x.T @ x / 9)
        assert torch.allclose(moments["b", False], (y.T @ y + 3 * shared) / 4)
        assert torch.allclose(moments["c", False], shared)
        assert torch.allclose(moments["a", True], torch.full((2, 2), 9 / 20))
        assert not moments["b", True].any() and not moments["c", True].any()


def test_layers_beside_experts_are_watched_as_ever():
    model = model_of("Mixtral")
    layers = [layer for layer in select(model, QUANT) if layer.role == "attn"]
    alone = gather(model, layers, Text(IDS).batches(2), gradients=True)
    together = gather(model, select(model, QUANT), Text(IDS).batches(2), gradients=True)
    for name, moment in alone.outputs.items():
        assert torch.allclose(moment, together.outputs[name], rtol=1e-3, atol=1e-12)
    assert not quantized(model)
