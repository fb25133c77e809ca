from dataclasses import replace

import pytest
import torch

from qat import checkpoints
from qat.config import LossKind, ModeConfig, TrainConfig
from qat.distill.loss import full_kl
from qat.distill.trainer import Loss, Trainer
from qat.errors import NumericsError
from qat.quant.linear import quantized
from tests import tiny

BOTH = ModeConfig(name="e2e", mlp=True, attn=True)
MLP = ModeConfig(name="mlp", mlp=True, attn=False)
ATTENTION = ModeConfig(name="attn", mlp=False, attn=True)
TRAIN = TrainConfig(steps=3, batch_size=12, lr=1e-3, eval_every=2, grad_clip=1e9)
TOPK = Loss(LossKind.topk_kl, 2.0)


def kind_of(name: str) -> str:
    return "mlp" if ".mlp." in name else "attn"


def trainer_of(student, readers, train=TRAIN, mode=BOTH, loss=TOPK, micro_batch=12) -> Trainer:
    layers = {name: (kind_of(name), module) for name, module in quantized(student).items()}
    return Trainer(student, layers, readers, train, mode, loss, replace(tiny.FP32, micro_batch=micro_batch), seed=0)


def parameters_of(student) -> dict[str, torch.Tensor]:
    return {
        f"{layer}/{name}": value.detach().clone()
        for layer, module in quantized(student).items()
        for name, value in module.named_parameters()
    }


def first_step(trainer: Trainer, student) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The figures of a step, and the gradients that the optimizer was given."""
    grads = {}

    def keep(*_):
        for layer, module in quantized(student).items():
            grads.update(
                {f"{layer}/{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            )

    trainer.optimizer.register_step_pre_hook(keep)
    return trainer.step(0), grads


def exact_loss(kind: LossKind, teacher, batch, logits) -> torch.Tensor:
    """Mean loss over all positions at once, in float64, spelled out in probabilities."""
    logits, logprobs = logits[:, :-1], batch.topk_logprobs.double()
    if kind is LossKind.topk_kl:
        p, q = (logprobs / 2).softmax(-1), (logits.gather(-1, batch.topk_ids) / 2).softmax(-1)
        return 4 * (p * (p / q).log()).sum(-1).mean()
    if kind is LossKind.bucket_kl:
        p, q = logprobs.exp(), logits.softmax(-1).gather(-1, batch.topk_ids)
        p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp_min(1e-6)], -1) for x in (p, q))
    else:
        p, q = teacher.load(torch.float64, tiny.CPU)(batch.input_ids).logits[:, :-1].softmax(-1), logits.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize(
    ("kind", "temperature"), [(LossKind.topk_kl, 2.0), (LossKind.bucket_kl, 1.0), (LossKind.full_kl, 1.0)]
)
def test_loss_and_gradient_are_those_of_one_exact_backward_pass(student, teacher, readers, kind, temperature):
    beside = teacher.load(torch.float32, tiny.CPU) if kind is LossKind.full_kl else None
    trainer = trainer_of(student, readers, loss=Loss(kind, temperature, beside), micro_batch=10)
    parts = tiny.exact_weights(student)
    batch = readers[0].batch(readers[0].training_rows(0, TRAIN.batch_size, 0))
    assert batch.topk_ids[..., 0].numel() > 256  # more positions than are computed at one time
    row, grads = first_step(trainer, student)
    loss = exact_loss(kind, teacher, batch, tiny.exact_logits(teacher, student, parts, batch.input_ids))
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    squares = 0.0
    for layer, values in parts.items():
        for name, value in values.items():
            found = grads[f"{layer}/{name}"].double()
            assert torch.allclose(found, value.grad, rtol=1e-2, atol=2e-3 * value.grad.abs().max()), (layer, name)
            squares += float(value.grad.square().sum())
    assert row["grad_norm"] == pytest.approx(squares**0.5, rel=1e-3)


def test_small_micro_batches_give_the_same_parameters(checkpoint, teacher, readers):
    trained = []
    for micro_batch in (1, 5, 12):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        trainer = trainer_of(student, readers, micro_batch=micro_batch)
        losses = [trainer.step(step)["loss"] for step in range(3)]
        trained.append((losses, parameters_of(student)))
    for losses, parameters in trained[:2]:
        assert losses == pytest.approx(trained[2][0], rel=1e-4)
        for name, value in trained[2][1].items():
            step = 1e-3 * value.square().mean().sqrt()
            assert (parameters[name] - value).abs().max() < 0.1 * step, name


@pytest.mark.parametrize(("mode", "learns"), [(MLP, {"mlp"}), (ATTENTION, {"attn"}), (BOTH, {"mlp", "attn"})])
def test_only_the_layers_of_the_mode_learn(student, readers, mode, learns):
    before, everything = parameters_of(student), {k: v.clone() for k, v in student.state_dict().items()}
    trainer_of(student, readers, mode=mode).step(0)
    for name, value in parameters_of(student).items():
        assert torch.equal(value, before[name]) == (kind_of(name) not in learns), name
    learned = {name.replace("/", ".") for name in before}
    assert all(torch.equal(v, everything[k]) for k, v in student.state_dict().items() if k not in learned)


def test_layers_that_do_not_learn_still_count(student, readers):
    plain = trainer_of(student, readers).kd_loss()
    assert trainer_of(student, readers, mode=MLP).kd_loss() == pytest.approx(plain, rel=1e-5)


def test_gradients_are_clipped(student, readers):
    trainer = trainer_of(student, readers, train=replace(TRAIN, grad_clip=1e-3))
    row, grads = first_step(trainer, student)
    assert row["grad_norm"] > 1e-3
    assert torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt() == pytest.approx(1e-3, rel=1e-2)


def test_no_gradient_is_left_over_from_the_step_before(student, readers):
    trainer = trainer_of(student, readers, train=replace(TRAIN, lr=0.0))
    first, second = trainer.step(0), trainer.step(0)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused_before_anything_changes(student, readers):
    trainer = trainer_of(student, readers)
    name, module = next(iter(quantized(student).items()))
    with torch.no_grad():
        module.lut[0] = float("nan")
    before = parameters_of(student)
    with pytest.raises(NumericsError, match=r"step 1.*train\.lr"):
        trainer.step(0)
    after = parameters_of(student)
    assert all(torch.equal(after[key], before[key]) for key in before if key != f"{name}/lut")


def test_training_lowers_the_held_out_loss_and_tells_of_it(student, readers):
    rows, best = [], []
    train = TrainConfig(steps=25, batch_size=8, lr=5e-3, eval_every=10)
    trainer = trainer_of(student, readers, train=train)
    history = trainer.run(rows.append, lambda: best.append(len(rows)))
    assert history.best < 0.9 * history.initial
    assert history.final == pytest.approx(trainer.kd_loss(), rel=1e-5)
    looks = [(row["step"], row["kd_loss"]) for row in rows if "kd_loss" in row]
    assert [step for step, _ in looks] == [0, 10, 20, 25]
    assert history.initial == looks[0][1] and history.final == looks[-1][1]
    assert history.best == min(kd for _, kd in looks)
    lowest_so_far = sum(kd < min([k for _, k in looks[:i]], default=float("inf")) for i, (_, kd) in enumerate(looks))
    assert len(best) == lowest_so_far
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 26)) and history.rows == rows
    assert history.tokens == 25 * 8 * 32 and history.seconds > 0


def test_the_held_out_loss_is_the_run_logs_measure(student, teacher, readers):
    batch = readers[1].batch(torch.arange(readers[1].rows))
    logits = tiny.exact_logits(teacher, student, tiny.exact_weights(student), batch.input_ids).detach()
    expected = exact_loss(LossKind.topk_kl, teacher, batch, logits)
    for micro_batch in (1, 12):
        assert trainer_of(student, readers, micro_batch=micro_batch).kd_loss() == pytest.approx(
            expected.item(), rel=1e-4
        )


def test_the_held_out_loss_leaves_layers_unbaked_for_training(student, readers):
    trainer_of(student, readers, mode=MLP).kd_loss()
    assert all((module.dense is None) == (kind_of(name) == "mlp") for name, module in quantized(student).items())


def test_a_teacher_beside_the_student_is_all_that_full_kl_needs(teacher, readers):
    model = teacher.load(torch.float32, tiny.CPU)
    batch = readers[1].batch(torch.arange(3))
    loss = Loss(LossKind.full_kl, 1.0, model)
    logits = model(batch.input_ids).logits[:, :-1] * 0.5
    expected = full_kl(logits, model(batch.input_ids).logits[:, :-1])
    found = loss.at(logits[batch.loss_mask], *loss.targets(batch))
    assert torch.allclose(found, expected[batch.loss_mask], atol=1e-5)
