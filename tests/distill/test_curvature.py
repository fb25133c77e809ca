import torch

from qat.conversion.moments import gather
from qat.distill import curvature
from qat.processes import Ranks
from qat.quant.architectures import Layer
from qat.quant.linear import quantized


def test_it_is_the_diagonal_of_what_conversion_goes_by(student, readers, monkeypatch):
    monkeypatch.setattr(curvature, "TOKENS", 8 * 32)
    layers, state = quantized(student), torch.get_rng_state()
    kinds = {name: "mlp" if ".mlp." in name else "attn" for name in layers}
    curvature.measure(student, layers, kinds, readers[0], Ranks())
    assert torch.get_rng_state().equal(state)  # whoever goes on with a run measures it once more
    known = [Layer(name, kinds[name], tuple(m.indices.shape), m.format) for name, m in layers.items()]
    moments = gather(student, known, [readers[0].batch(torch.arange(8))], gradients=True)
    for layer in known:
        outputs, inputs = layers[layer.name].curvature
        assert torch.allclose(outputs, moments.outputs[layer.name].diagonal(), rtol=1e-4)
        assert torch.allclose(inputs, moments.inputs[layer.source].diagonal(), rtol=1e-4)
        assert outputs.min() >= 0 and inputs.min() >= 0 and outputs.max() > 0


def test_it_tells_how_the_loss_bends(student, teacher, readers):
    """KL(student‖moved student) is to second order half the second derivative times the move's square."""
    layers = quantized(student)
    kinds = {name: "mlp" if ".mlp." in name else "attn" for name in layers}
    curvature.measure(student, layers, kinds, readers[0], Ranks())
    ids = readers[0].batch(torch.arange(readers[0].rows)).input_ids
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = student(ids).logits.double().log_softmax(-1)
        for layer in layers.values():
            outputs, inputs = layer.curvature
            weight = layer.weight(torch.float32)
            move = 0.1 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=draw)
            layer.dense = weight + move
            after = student(ids).logits.double().log_softmax(-1)
            layer.dense = None
            found = (before.exp() * (before - after)).sum(-1).mean()
            expected = 0.5 * (outputs[:, None] * inputs * move.square()).sum().double()
            assert expected / 2 < found < expected * 2


def test_every_process_gets_the_same(student, readers, monkeypatch):
    monkeypatch.setattr(curvature, "TOKENS", 4 * 32)
    layers, kinds = quantized(student), dict.fromkeys(quantized(student), "mlp")
    curvature.measure(student, layers, kinds, readers[0], Ranks())
    alone = {name: layer.curvature for name, layer in layers.items()}
    ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "sum_", lambda _, tensors: [tensor.mul_(2) for tensor in tensors])
    curvature.measure(student, layers, kinds, readers[0], ranks)
    for name, layer in layers.items():
        assert all(map(torch.allclose, layer.curvature, alone[name]))
