"""What only a GPU can show: recorded, compiled and fused, a step is still the same step."""

from dataclasses import replace

import pytest
import torch

from qat import checkpoints, decoder
from qat.config import LearnConfig, LossKind, ModeConfig, TrainConfig
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.forward import FAST, use
from qat.quant.linear import quantized
from tests import tiny
from tests.distill.test_vocabulary import student_of, trainer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

GPU = torch.device("cuda")
STEPS = 6  # two plain, one recorded, the others replayed
TRAIN = TrainConfig(steps=STEPS, batch_size=8, lr=1e-3, eval_every=100)
LOSSES = {kind: Loss(kind, 2.0 if kind is LossKind.topk_kl else 1.0) for kind in (LossKind.topk_kl, LossKind.bucket_kl)}


def trained(checkpoint, teacher, readers, device, loss=LOSSES[LossKind.bucket_kl], train=TRAIN, plain=False, **machine):
    """Loss and gradient norm of each step, and the parameters after the last."""
    machine = replace(tiny.FP32, **({"device": device, "micro_batch": 8} | machine))
    student, _ = checkpoints.load(checkpoint, teacher, machine, latents=train.learn.latent > 0)
    use(student, FAST)
    layers = {name: ("mlp" if ".mlp." in name else "attn", module) for name, module in quantized(student).items()}
    trainer = Trainer(student, layers, readers, train, ModeConfig("e2e", True, True), loss, machine, 0)
    if plain:
        trainer.step.recorder.stream = None
    figures = [trainer.step(batch, 1.0) for batch in trainer.batches(0)]
    lengths = len(train.lengths) or 1
    assert len(trainer.step.recorder._graphs) == (0 if plain or device.type == "cpu" else 3 + lengths)
    return figures, {p.name: p.value.cpu() for p in trainer.learners.parameters}


def same(one, other, loss=1e-3, apart=0.05):
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=loss)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=20 * loss)
        assert not ours.skipped
    for name, value in other[1].items():
        moved = STEPS * 1e-3 * value.square().mean().sqrt()
        assert (one[1][name] - value).abs().mean() < apart * moved, name


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would hide what is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_batches_come_in_pinned_memory(readers):
    """So that their copies run beside the GPU's work."""
    for batch in readers[0].stream(readers[0].in_order(8), GPU):
        assert all(tensor.is_pinned() for tensor in batch.stored.values())
        assert batch.to(GPU).input_ids.is_cuda


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_as_the_cpu_does(checkpoint, teacher, readers, kind, compiled):
    expected = trained(checkpoint, teacher, readers, torch.device("cpu"), LOSSES[kind])
    same(trained(checkpoint, teacher, readers, GPU, LOSSES[kind], compile=compiled), expected)


@pytest.mark.parametrize("size", [8, 4])
def test_recorded_steps_are_plain_steps(checkpoint, teacher, readers, size):
    plain = trained(checkpoint, teacher, readers, GPU, plain=True, micro_batch=size)
    same(trained(checkpoint, teacher, readers, GPU, micro_batch=size), plain, 1e-4, 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", [{}, {"compile": True}, {"compile": True, "checkpointing": True, "micro_batch": 4}])
@pytest.mark.parametrize("latent", [0.0, 1.0])
def test_short_types_stay_close(checkpoint, teacher, readers, dtype, setting, latent):
    train = replace(TRAIN, learn=LearnConfig(latent=latent))
    expected = trained(checkpoint, teacher, readers, torch.device("cpu"), train=train)
    figures, _ = trained(checkpoint, teacher, readers, GPU, train=train, dtype=dtype, **setting)
    for ours, theirs in zip(figures, expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.1) and not ours.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_lengths_train_as_on_the_cpu(checkpoint, teacher, readers, monkeypatch, dtype):
    """Attention of either length has its own kernels, all recorded; their gradients meet in one sum."""
    monkeypatch.setattr(decoder, "LONGEST", 16)
    train = replace(TRAIN, lengths=[8, 32], learn=LearnConfig(latent=1.0))

    def on(device, **machine):
        beside = teacher.load(machine.get("dtype", torch.float32), device)
        use(beside, FAST)
        loss = Loss(LossKind.full_kl, teacher=beside)
        return trained(checkpoint, teacher, readers, device, loss, train, **machine)

    expected = on(torch.device("cpu"))
    figures, parameters = on(GPU, compile=True, dtype=dtype)
    if dtype is torch.float32:
        same((figures, parameters), expected)
    for ours, theirs in zip(figures, expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.1) and not ours.skipped


def test_everything_that_can_learn_does(checkpoint, teacher, readers):
    train = replace(TRAIN, learn=LearnConfig(1.0, 1.0, 1.0, 1.0))
    expected = trained(checkpoint, teacher, readers, torch.device("cpu"), train=train)
    figures, parameters = trained(checkpoint, teacher, readers, GPU, train=train)
    assert figures[-1].loss == pytest.approx(expected[0][-1].loss, rel=0.05)
    assert parameters.keys() == expected[1].keys()


def test_checkpointed_layers_can_be_compiled_and_recorded(checkpoint, teacher, readers):
    expected = trained(checkpoint, teacher, readers, GPU, plain=True)
    same(trained(checkpoint, teacher, readers, GPU, compile=True, checkpointing=True), expected)


def test_a_step_that_is_not_finite_is_skipped_while_recorded(checkpoint, teacher, readers):
    machine = replace(tiny.FP32, device=GPU, micro_batch=8)
    student, _ = checkpoints.load(checkpoint, teacher, machine)
    use(student, FAST)
    layers = {name: ("mlp", module) for name, module in quantized(student).items()}
    trainer = Trainer(
        student, layers, readers, TRAIN, ModeConfig("mlp", True, False), LOSSES[LossKind.bucket_kl], machine, 0
    )
    batches = list(trainer.batches(0))
    for batch in batches[:4]:
        trainer.step(batch, 1.0)
    before = {p.name: p.value.clone() for p in trainer.learners.parameters}
    batches[4][0].stored["topk_logprobs"][0, 0] = float("nan")
    assert trainer.step(batches[4], 1.0).skipped
    assert all(p.value.equal(before[p.name]) for p in trainer.learners.parameters)
    assert not trainer.step(batches[5], 1.0).skipped


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_embedding_and_head_learn_as_on_a_cpu(readers, name):
    """Their gradients come from recorded graphs, out of chunks and out of rows that repeat."""
    found = []
    for device in (tiny.CPU, GPU):
        student, roles = student_of(name)
        trainer = trainer_of(student.to(device), roles, readers, LOSSES[LossKind.bucket_kl], TRAIN, 8, device)
        figures = [trainer.step(batch, 1.0) for batch in trainer.batches(0)]
        found.append((figures, {p.name: p.value.cpu() for p in trainer.learners.parameters}))
    assert any(name.startswith("model.embed_tokens.") for name in found[0][1])
    same(found[1], found[0], apart=0.1)  # Adam's first steps are as long where a gradient is next to nothing
