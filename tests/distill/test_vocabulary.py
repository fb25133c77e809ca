"""Embedding and head that learn: their gradients, alone and tied, against one float64 backward pass."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers

from qat.config import (
    ConvertConfig,
    KMeansBackend,
    KMeansConfig,
    LearnConfig,
    Levels,
    LossKind,
    ModeConfig,
    WeightConfig,
    WeightFormat,
)
from qat.conversion.convert import install, quantize
from qat.conversion.moments import gather
from qat.distill.loss import Loss
from qat.distill.state import State
from qat.distill.trainer import Trainer
from qat.forward import FAST, Pass, use
from qat.quant import latent
from qat.quant.architectures import select
from qat.quant.embedding import ends
from qat.quant.linear import quantized
from tests import tiny
from tests.distill.test_trainer import TRAIN, exact_loss, grads_of, steps_of

E2E = ModeConfig(name="e2e", mlp=True, attn=True, embed=True)
CODEBOOK = WeightConfig(bits=3, rank=2)
GRID = WeightConfig(bits=3, format=WeightFormat.grid, group=16, levels=Levels.shifted)
KINDS = {
    "tied": ("Llama", {"tie_word_embeddings": True}, FAST),
    "untied": ("Llama", {"tie_word_embeddings": False}, FAST),
    "scaled and capped": ("Gemma2", {"head_dim": 16, "pad_token_id": None}, Pass()),
}


@cache
def model_of(name: str) -> tuple[transformers.PreTrainedModel, Pass]:
    kind, extra, how = KINDS[name]
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**shape, **heads, **extra)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False), how


@cache
def converted(name: str):
    """A model's quantized matrices."""
    model, _ = model_of(name)
    quant = replace(tiny.QUANT, embed=CODEBOOK, head=None if ends(model).tied else GRID)
    layers = select(model, quant)
    rows = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(0))
    moments = gather(model, layers, tiny.Text(rows).batches(8))
    settings, kmeans = ConvertConfig(rounds=1, sweeps=0), KMeansConfig("", KMeansBackend.exact)
    return quantize(layers, lambda name: model.get_submodule(name).weight, moments, settings, kmeans, tiny.CPU)


def student_of(name: str):
    model, how = model_of(name)
    student, made = copy.deepcopy(model), converted(name)
    install(student, {one.layer.name: copy.deepcopy(one.module) for one in made})
    use(student, how)
    return student, {one.layer.name: one.layer.role for one in made}


def trainer_of(student, roles, readers, loss, train=TRAIN, micro_batch=12, device=tiny.CPU) -> Trainer:
    layers = {name: (roles[name], module) for name, module in quantized(student).items()}
    machine = replace(tiny.FP32, micro_batch=micro_batch, device=device)
    return Trainer(student, layers, readers, train, E2E, loss, machine, seed=0)


def exact(student, name):
    """float64 logits of token ids as a function of float64 parts, which are given too."""
    model = copy.deepcopy(model_of(name)[0]).double()
    modules = quantized(student)
    parts = {
        layer: {part: value.detach().double().requires_grad_() for part, value in module.parts().items()}
        for layer, module in modules.items()
    }

    def logits(ids):
        weights = {f"{layer}.weight": written(modules[layer], values) for layer, values in parts.items()}
        return torch.func.functional_call(model, weights, (ids,)).logits

    return parts, logits


def written(module, parts):
    """A weight spelled out from its parts."""
    index = module.indices.long()
    if "codebook" in parts:
        return parts["codebook"][index] * (parts["scale_A"] @ torch.diag(parts["rank_magnitude"]) @ parts["scale_B"])
    group = module.format.group
    return index * parts["scale"].repeat_interleave(group, 1) + parts["shift"].repeat_interleave(group, 1)


class Beside:
    """A teacher in the place of a folder."""

    def __init__(self, model):
        self.model = model

    def load(self, dtype, device):
        return copy.deepcopy(self.model).to(dtype)


@pytest.mark.parametrize("micro_batch", [12, 5])
@pytest.mark.parametrize(
    ("kind", "temperature"), [(LossKind.topk_kl, 2.0), (LossKind.bucket_kl, 1.0), (LossKind.full_kl, 1.0)]
)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_one_exact_backward_pass(readers, name, kind, temperature, micro_batch):
    student, roles = student_of(name)
    teacher, how = model_of(name)
    use(teacher, how)
    loss = Loss(kind, temperature, teacher=teacher if kind is LossKind.full_kl else None)
    parts, logits = exact(student, name)
    trainer = trainer_of(student, roles, readers, loss, micro_batch=micro_batch)
    (figures,), grads = steps_of(trainer), grads_of(trainer)
    batch = readers[0].batch(readers[0].training_rows(0, TRAIN.batch_size, 0))
    wanted = exact_loss(kind, Beside(teacher), batch, logits(batch.input_ids))
    wanted.backward()
    assert figures.loss == pytest.approx(wanted.item(), rel=1e-4)
    for layer, values in parts.items():
        for part, value in values.items():
            found, most = grads[f"{layer}.{part}"].double(), value.grad.abs().max()
            assert torch.allclose(found, value.grad, rtol=1e-2, atol=2e-3 * most), (layer, part)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_training_goes_on_from_a_state_to_the_same_bits(readers, name):
    """Two steps, a state, two more; and the latter again by a student that began anew."""
    train = replace(TRAIN, lr=1e-2, learn=LearnConfig(latent=1.0))
    batch = next(iter(readers[0].stream([readers[0].training_rows(0, 12, 0)], tiny.CPU)))

    def begun():
        student, roles = student_of(name)
        exact = model_of(name)[0]
        for layer, module in quantized(student).items():
            weight = exact.get_submodule(layer).weight
            module.latent = torch.nn.Parameter(latent.between(module, weight), requires_grad=False)
        return trainer_of(student, roles, readers, Loss(LossKind.bucket_kl), train)

    whole, again = begun(), begun()
    for _ in range(2):
        whole.step([batch], 1.0)
    whole.history.step = 2
    state = whole.state()
    kept = State(state.step, {name: value.clone() for name, value in state.tensors.items()}, state.facts)
    for _ in range(2):
        whole.step([batch], 1.0)
    again.restore(kept, [])
    for _ in range(2):
        again.step([batch], 1.0)
    for one, other in zip(whole.learners.parameters, again.learners.parameters, strict=True):
        assert torch.equal(one.value, other.value), one.name
    assert any(p.name == "model.embed_tokens.latent" for p in again.learners.parameters)
