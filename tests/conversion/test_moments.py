from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from transformers import CONFIG_MAPPING

from qat import flow
from qat.cache.batch import Batch, Text
from qat.conversion import moments
from qat.conversion.convert import install
from qat.conversion.moments import gather
from qat.errors import NumericsError
from qat.quant.architectures import select
from tests import tiny


@pytest.fixture
def layers(model):
    return select(model, tiny.QUANT)


def seen(model, names, rows):
    """The inputs of each layer in one pass over all rows, in float64."""
    found = {}

    def capture(name):
        return lambda module, arguments: found.update({name: arguments[0].detach().double().flatten(0, 1)})

    hooks = [model.get_submodule(name).register_forward_pre_hook(capture(name)) for name in names]
    model(rows)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("micro_batch", [3, 16])
def test_moments_are_the_mean_products_of_the_inputs(model, layers, rows, micro_batch):
    found = gather(model, layers, Text(rows).batches(micro_batch))
    sources = {layer.source for layer in layers}
    assert set(found.inputs) == sources and len(sources) == 8 and not found.outputs
    for name, x in seen(model, sources, rows).items():
        expected = torch.einsum("ti,tj->ij", x, x) / len(x)
        assert found.inputs[name].dtype == torch.float32
        assert torch.allclose(found.inputs[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())), name


def test_layers_that_share_a_source_do_see_the_same_input(model, layers, rows):
    inputs = seen(model, [layer.name for layer in layers], rows)
    assert all(torch.equal(inputs[layer.name], inputs[layer.source]) for layer in layers)


def test_gradient_moments_are_those_of_autograd(teacher, layers, rows):
    """The same draws, one pass over everything, float64, gradients of every layer's output by autograd."""
    model = teacher.load(torch.float32, tiny.CPU)
    found = gather(model, layers, Text(rows).batches(4), gradients=True)
    exact = teacher.load(torch.float32, tiny.CPU).double()
    outputs, x = {}, {}
    for layer in layers:
        module = exact.get_submodule(layer.name)
        module.weight.requires_grad_()
        module.register_forward_hook(
            lambda m, i, o, name=layer.name: outputs.update({name: o}) or x.update({name: i[0]})
        )
    logits = exact(rows).logits
    draw = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.searchsorted(logits.softmax(-1).cumsum(-1), draw[..., None])[..., 0].clamp_max(logits.shape[-1] - 1)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    sizes = {}
    for layer in layers:
        g = gradients[layer.name].flatten(0, 1)
        close(found.outputs[layer.name], g.T @ g / len(g))
        sizes[layer.source] = sizes.get(layer.source, 0) + g.square().mean(1)
    for layer in layers:
        weight, inputs = sizes[layer.source].sqrt(), x[layer.name].flatten(0, 1)
        close(found.inputs[layer.source], (inputs * weight[:, None]).T @ inputs / weight.sum())


def close(found, expected):
    assert float((found.double() - expected.detach()).norm() / expected.detach().norm()) < 1e-3


def test_gradient_moments_do_not_depend_on_the_micro_batch(model, layers, rows):
    few, many = (gather(model, layers, Text(rows).batches(size), gradients=True) for size in (3, 10))
    for layer in layers:
        close(few.outputs[layer.name], many.outputs[layer.name].double())
        close(few.inputs[layer.source], many.inputs[layer.source].double())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_run_whole_gives_what_its_layers_give_one_after_the_other(monkeypatch, model, layers, rows, gradients):
    assert flow.flows(model, {"input_ids": rows})
    expected = gather(model, layers, Text(rows).batches(4), gradients)
    monkeypatch.setattr(moments, "flows", lambda *_: False)
    found = gather(model, layers, Text(rows).batches(4), gradients)
    assert list(found.inputs) == list(expected.inputs) and list(found.outputs) == list(expected.outputs)
    for name, moment in (found.inputs | found.outputs).items():
        close(moment, (expected.inputs | expected.outputs)[name].double())


def test_layers_that_give_something_else_one_after_the_other_are_noticed(monkeypatch, teacher, rows):
    model = teacher.load(torch.float32, tiny.CPU)
    through = flow.Flow.through
    monkeypatch.setattr(flow.Flow, "through", lambda self, *given: through(self, *given) * 1.01)
    assert not flow.flows(model, {"input_ids": rows})


def test_layers_that_share_keys_and_values_are_run_whole(rows):
    """Gemma 3n: the upper layers attend to what lower ones kept, and streams are mixed between layers."""
    model = zoo.tiny(CONFIG_MAPPING["gemma3n_text"])
    assert not flow.flows(model, {"input_ids": rows})
    chosen = select(model, replace(tiny.QUANT, partial=True))
    found = gather(model, chosen, Text(rows).batches(4))
    for name, x in seen(model, {layer.source for layer in chosen}, rows).items():
        close(found.inputs[name], x.T @ x / len(x))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kept_bytes", [1, 9_000])
def test_states_in_a_file_give_what_those_in_memory_give(monkeypatch, model, layers, rows, kept_bytes, gradients):
    monkeypatch.setattr(moments, "STATES", {"cpu": 3 * rows[0].numel() * model.config.hidden_size})  # 3 rows
    expected = gather(model, layers, Text(rows).batches(8), gradients)
    monkeypatch.setattr(flow, "KEPT_BYTES", kept_bytes)
    found = gather(model, layers, Text(rows).batches(8), gradients)
    assert list(found.inputs) == list(expected.inputs) and list(found.outputs) == list(expected.outputs)
    for name, moment in (found.inputs | found.outputs).items():
        assert torch.equal(moment, (expected.inputs | expected.outputs)[name])
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_the_file_of_states_does_not_grow_where_others_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "KEPT_BYTES", 100)
    store, kept = flow.Store(tmp_path), {n: torch.randn(4, 5).bfloat16() for n in range(6)}
    for n in range(20):
        store.put(n % 6, kept[n % 6])
    store.move(5, "moved")
    assert all(torch.equal(store.get("moved" if n == 5 else n), tensor) for n, tensor in kept.items())
    assert store._end == 4 * 40 and store._used == {"cpu": 80}  # two in memory
    store.drop(0)
    with pytest.raises(KeyError):
        store.get(0)


def test_moments_of_a_decoder_layer_are_given_out_before_the_next_is_looked_at(model, layers, rows):
    text = Text(rows).batches(8)
    for gradients, order in ((False, "01"), (True, "10")):
        parts = moments.walk(model, layers, text, gradients)
        assert [{layer.name.split(".")[2] for layer in members} for members, _ in parts] == [set(one) for one in order]


def test_layers_of_packed_rows_see_their_own_documents_only(teacher, layers):
    """Rows that hold several documents give what the documents give in rows of their own."""
    model, ids = teacher.load(torch.float32, tiny.CPU), torch.randint(200, (6, 16))
    starts = torch.zeros(3, 32, dtype=torch.uint8)
    starts[:, ::16] = 1
    joined = Batch({"input_ids": ids.view(3, 32), "document_starts": starts}, 0, True)
    for gradients in (False, True):
        found, expected = (gather(model, layers, text, gradients) for text in ([joined], Text(ids).batches(6)))
        for name, moment in (found.inputs | found.outputs).items():
            close(moment, (expected.inputs | expected.outputs)[name].double())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_that_would_cache_keys_and_values_sees_no_position_twice(teacher, model, layers, rows, gradients):
    caching = teacher.load(torch.float32, tiny.CPU)
    caching.config.use_cache = True
    found, expected = (gather(m, layers, Text(rows).batches(8), gradients) for m in (caching, model))
    for name, moment in (found.inputs | found.outputs).items():
        close(moment, (expected.inputs | expected.outputs)[name].double())


def test_only_the_layers_asked_for_are_looked_at(model, layers, rows):
    some = [layer for layer in layers if "layers.1" in layer.name and layer.role == "mlp"]
    found = gather(model, some, Text(rows).batches(8), gradients=True)
    assert set(found.outputs) == {layer.name for layer in some}
    assert set(found.inputs) == {layer.source for layer in some}


def test_a_quantized_model_can_be_looked_at_too(teacher, model, layers, rows):
    student = teacher.load(torch.float32, tiny.CPU)
    install(student, {name: module for name, (_, module, _) in tiny.converted(model, rows).items()})
    of_student, of_teacher = (gather(m, layers, Text(rows).batches(8), gradients=True) for m in (student, model))
    assert set(of_student.outputs) == {layer.name for layer in layers}
    deep = layers[-1]
    assert not torch.allclose(of_student.inputs[deep.source], of_teacher.inputs[deep.source], rtol=1e-2)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_left_as_it_was_and_moments_can_be_written_to(model, layers, rows, gradients):
    found = gather(model, layers, Text(rows).batches(8), gradients)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    found.inputs[layers[0].source].add_(1.0)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_bf16_model_gives_fp32_moments(teacher, layers, rows, gradients):
    found = gather(teacher.load(torch.bfloat16, tiny.CPU), layers, Text(rows).batches(8), gradients)
    assert {moment.dtype for moment in [*found.inputs.values(), *found.outputs.values()]} == {torch.float32}


def test_inputs_that_are_not_finite_are_refused_and_the_hooks_removed(teacher, layers, rows):
    model = teacher.load(torch.float32, tiny.CPU)
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.q_proj .*instance\.precision=fp32"):
        gather(model, layers, Text(rows).batches(8))
    assert not any(module._forward_pre_hooks for module in model.modules())
