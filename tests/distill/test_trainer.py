import copy
import logging
import math
import os
import signal
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import transformers

from qat import checkpoints
from qat.cache.reader import CacheReader
from qat.config import LearnConfig, LossKind, ModeConfig, TrainConfig
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.distill.state import State, States
from qat.distill.step import Scaler
from qat.distill.trainer import MAX_SKIPS, HeldOut, Trainer
from qat.errors import ArtifactError, MissingError, NumericsError
from qat.fidelity import Sample, settle
from qat.forward import FAST, use
from qat.norms import learned
from qat.processes import Ranks
from qat.quant.linear import quantized
from tests import tiny

WHOSE = {"run_id": "SR-001", "started": "2026-11-29T10:00:00+0000"}
BOTH = ModeConfig(name="e2e", mlp=True, attn=True)
MLP = ModeConfig(name="mlp", mlp=True, attn=False)
ATTENTION = ModeConfig(name="attn", mlp=False, attn=True)
TRAIN = TrainConfig(steps=3, batch_size=12, lr=1e-3, eval_every=2, grad_clip=1e9)
ALL = LearnConfig(scales=1.0, codebooks=1.0, latent=1.0, norms=1.0)
TOPK = Loss(LossKind.topk_kl, 2.0)


def kind_of(name: str) -> str:
    return "mlp" if ".mlp." in name else "attn"


def trainer_of(student, readers, train=TRAIN, mode=BOTH, loss=TOPK, **machine) -> Trainer:
    layers = {name: (kind_of(name), module) for name, module in quantized(student).items()}
    machine = replace(tiny.FP32, **({"micro_batch": 12} | machine))
    return Trainer(student, layers, readers, train, mode, loss, machine, seed=0)


def steps_of(trainer: Trainer, count=1):
    """The figures of some steps at the full rate."""
    with closing(trainer.batches(0)) as batches:
        return [trainer.step(next(batches), 1.0) for _ in range(count)]


def parameters_of(student) -> dict[str, torch.Tensor]:
    return {
        f"{layer}/{name}": value.detach().clone()
        for layer, module in quantized(student).items()
        for name, value in module.named_parameters()
    }


def grads_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the last step, clipped."""
    return {p.name: p.value.grad.clone() for p in trainer.learners.parameters}


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
    loss = Loss(kind, temperature, teacher=beside)
    trainer = trainer_of(student, readers, loss=loss, micro_batch=10)
    parts = tiny.exact_weights(student)
    batch = readers[0].batch(readers[0].training_rows(0, TRAIN.batch_size, 0))
    assert batch.topk_ids[..., 0].numel() > 256  # more positions than are computed at one time
    (figures,), grads = steps_of(trainer), grads_of(trainer)
    loss = exact_loss(kind, teacher, batch, tiny.exact_logits(teacher, student, parts, batch.input_ids))
    loss.backward()
    assert figures.loss == pytest.approx(loss.item(), rel=1e-4)
    squares = 0.0
    for layer, values in parts.items():
        for name, value in values.items():
            found, most = grads[f"{layer}.{name}"].double(), value.grad.abs().max()
            assert torch.allclose(found, value.grad, rtol=1e-2, atol=2e-3 * most), (layer, name)
            squares += float(value.grad.square().sum())
    assert figures.grad_norm == pytest.approx(squares**0.5, rel=1e-3)


def test_small_micro_batches_give_the_same_parameters(checkpoint, teacher, readers):
    trained = []
    for size in (1, 5, 12):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32, latents=True)
        trainer = trainer_of(student, readers, train=replace(TRAIN, learn=ALL), micro_batch=size)
        losses = [figures.loss for figures in steps_of(trainer, 3)]
        trained.append((losses, {p.name: p.value.clone() for p in trainer.learners.parameters}))
    for losses, parameters in trained[:2]:
        assert losses == pytest.approx(trained[2][0], rel=1e-3)
        for name, value in trained[2][1].items():
            step = 1e-3 * value.square().mean().sqrt()
            assert (parameters[name] - value).abs().mean() < 0.02 * step, name


@pytest.mark.parametrize(("mode", "learns"), [(MLP, {"mlp"}), (ATTENTION, {"attn"}), (BOTH, {"mlp", "attn"})])
def test_only_the_layers_of_the_mode_learn(student, readers, mode, learns):
    before, everything = parameters_of(student), {k: v.clone() for k, v in student.state_dict().items()}
    trainer = trainer_of(student, readers, mode=mode)
    steps_of(trainer)
    for name, value in parameters_of(student).items():
        assert torch.equal(value, before[name]) == (kind_of(name) not in learns), name
    changing = {name.replace("/", ".") for name in before}
    assert all(torch.equal(v, everything[k]) for k, v in student.state_dict().items() if k not in changing)
    assert {kind_of(name) for name, layer in quantized(student).items() if layer.dense.requires_grad} == learns


@pytest.mark.parametrize("kind", ["scales", "codebooks", "latent", "norms"])
def test_only_the_kind_that_learns_changes(checkpoint, teacher, readers, kind):
    student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32, latents=True)
    before = parameters_of(student)
    weights = {name: v.clone() for name, v in student.state_dict().items() if "norm" in name}
    learn = LearnConfig(**{"scales": 0.0, "codebooks": 0.0} | {kind: 1.0})
    trainer = trainer_of(student, readers, train=replace(TRAIN, learn=learn))
    steps_of(trainer)
    trainer.learners.write()
    changed = {name.split("/")[1] for name, value in parameters_of(student).items() if not value.equal(before[name])}
    assert (
        changed
        == {
            "scales": {"scale_A", "scale_B", "rank_magnitude"},
            "codebooks": {"codebook"},
            "latent": {"latent"},
            "norms": set(),
        }[kind]
    )
    moved = {n for n, v in student.state_dict().items() if "norm" in n and not v.equal(weights[n])}
    assert (len(moved) > 0) == (kind == "norms") == bool(learned(student))


def test_latent_weights_learn_straight_through_and_move_indices(checkpoint, teacher, readers):
    student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32, latents=True)
    before = {name: layer.indices.clone() for name, layer in quantized(student).items()}
    learn = LearnConfig(latent=100.0)
    trainer = trainer_of(student, readers, train=replace(TRAIN, learn=learn))
    steps_of(trainer)
    trainer.learners.write()
    layer = quantized(student)["model.layers.1.mlp.down_proj"]
    assert any(not layer.indices.equal(before[name]) for name, layer in quantized(student).items())
    scale = (layer.scale_A * layer.rank_magnitude).double() @ layer.scale_B.double()
    away = (layer.latent[..., None].double() - layer.codebook.double() * scale[..., None]).abs()
    chosen = away.gather(-1, layer.indices.long()[..., None])[..., 0]
    assert torch.allclose(chosen, away.min(-1).values, atol=1e-6)


def test_layers_that_do_not_learn_still_count(student, readers):
    plain = trainer_of(student, readers).held_out().kd_loss
    assert trainer_of(student, readers, mode=MLP).held_out().kd_loss == pytest.approx(plain, rel=1e-5)


def test_gradients_are_clipped(student, readers):
    trainer = trainer_of(student, readers, train=replace(TRAIN, grad_clip=1e-3))
    (figures,) = steps_of(trainer)
    assert figures.grad_norm > 1e-3
    squares = torch.stack([g.square().sum() for g in grads_of(trainer).values()]).sum()
    assert squares.sqrt() == pytest.approx(1e-3, rel=1e-2)


def test_no_gradient_is_left_over_from_the_step_before(student, readers):
    trainer = trainer_of(student, readers)
    batch = next(trainer.batches(0))
    first, second = (trainer.step(batch, 0.0) for _ in range(2))
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)


def test_checkpointing_changes_nothing(checkpoint, teacher, readers):
    figures = []
    for on in (False, True):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        figures.append(steps_of(trainer_of(student, readers, checkpointing=on), 2))
    assert figures[0] == figures[1]


def test_fp16_scales_the_loss_and_gives_the_same_gradients(checkpoint, teacher, readers):
    grads = []
    for dtype in (torch.float32, torch.float16):
        machine = replace(tiny.FP32, dtype=dtype)
        settle(teacher, machine, Sample.of_rows(readers[0]))  # eager attention rounds more
        student, _ = checkpoints.load(checkpoint, teacher, machine)
        trainer = trainer_of(student, readers, dtype=dtype)
        (figures,) = steps_of(trainer)
        assert trainer.step.scaler.scale == (65536 if dtype == torch.float16 else 1) and not figures.skipped
        grads.append((figures.grad_norm, grads_of(trainer)))
    assert grads[1][0] == pytest.approx(grads[0][0], rel=1e-2)
    for name, value in grads[0][1].items():
        assert (grads[1][1][name] - value).norm() < 0.02 * value.norm() + 2e-3 * grads[0][0], name


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(checkpoint, teacher, readers):
    student, _ = checkpoints.load(checkpoint, teacher, replace(tiny.FP32, dtype=torch.float16))
    trainer = trainer_of(student, readers, dtype=torch.float16)
    trainer.step.scaler.scale.fill_(2.0**40)
    before = parameters_of(student)
    (figures,) = steps_of(trainer)
    assert figures.skipped and math.isfinite(figures.loss) and trainer.step.scaler.scale == 2.0**39
    assert all(value.equal(before[name]) for name, value in parameters_of(student).items())


def test_the_scale_grows_after_many_good_steps_and_only_then(checkpoint, teacher, readers, monkeypatch):
    student, _ = checkpoints.load(checkpoint, teacher, replace(tiny.FP32, dtype=torch.float16))
    scaler = trainer_of(student, readers, dtype=torch.float16).step.scaler
    monkeypatch.setattr(type(scaler), "PATIENCE", 3)
    seen = []
    for skipped in (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0):
        scaler.update(torch.tensor(skipped))
        seen.append(float(scaler.scale) / 65536)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1]


def test_a_step_that_is_not_finite_is_skipped_and_counted(student, readers):
    rows = []
    trainer = trainer_of(student, readers, train=replace(TRAIN, steps=4, eval_every=100))
    real, calls = trainer.step._attempt, []

    def spoil(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 2:
            trainer.step.learners.grads()[0].flatten()[0] = 0
            trainer.step.total.fill_(math.nan)

    trainer.step._attempt = spoil
    before = {}

    def report(row):
        rows.append(row)
        if row.get("step") in (1, 2) and "loss" in row:
            before[row["step"]] = parameters_of(student)

    trainer.run(report, lambda: None)
    steps = [row for row in rows if "loss" in row]
    assert [row["skipped_steps"] for row in steps] == [0, 1, 1, 1] and math.isnan(steps[1]["loss"])
    assert all(value.equal(before[1][name]) for name, value in before[2].items())
    assert (trainer.history.skipped, trainer.history.skipped_in_a_row) == (1, 0)


def test_too_many_skips_in_a_row_stop_the_run_in_one_sentence(student, readers):
    rows = []
    trainer = trainer_of(student, readers, train=replace(TRAIN, steps=50, eval_every=100))
    real = trainer.step._attempt
    trainer.step._attempt = lambda *args: (real(*args), trainer.step.total.fill_(math.inf))
    before = parameters_of(student)
    with pytest.raises(NumericsError, match=rf"{MAX_SKIPS} steps in a row.*checkpoints/best.*train\.lr"):
        trainer.run(rows.append, lambda: None)
    assert len([row for row in rows if "loss" in row]) == MAX_SKIPS
    assert all(value.equal(before[name]) for name, value in parameters_of(student).items())


def test_out_of_memory_halves_the_micro_batch_once_and_gives_the_same(checkpoint, teacher, readers, caplog):
    caplog.set_level("INFO")
    results = []
    for limit in (12, 3):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        trainer = trainer_of(student, readers, micro_batch=12, checkpointing=False)
        real = trainer.step._backward

        def short_of_memory(inputs, outputs, real=real, limit=limit):
            real(inputs, outputs)  # half of the work is done when memory runs out
            if len(inputs["input_ids"]) > limit:
                raise torch.OutOfMemoryError

        trainer.step._backward = short_of_memory
        results.append((steps_of(trainer, 2), grads_of(trainer)))
    assert [line for line in caplog.messages if "out of memory" in line] == [
        f"out of memory: {size} sequences at once from here on, the batch stays as it is" for size in (6, 3)
    ]
    assert [f.loss for f in results[1][0]] == pytest.approx([f.loss for f in results[0][0]], rel=1e-4)
    for name, value in results[0][1].items():
        assert torch.allclose(results[1][1][name], value, rtol=1e-2, atol=1e-3 * value.abs().max()), name


def test_when_memory_runs_out_for_few_tokens_activations_are_computed_twice(student, readers, caplog):
    caplog.set_level("INFO")
    trainer = trainer_of(student, readers, checkpointing=None)
    real, calls = trainer.step._backward, []

    def once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        real(*args)

    trainer.step._backward = once
    steps_of(trainer)
    assert trainer.step.machine.checkpointing and trainer.step.machine.micro_batch == 12
    assert "out of memory: activations are computed twice from here on" in caplog.messages


def test_a_sequence_that_never_fits_is_told_in_one_sentence(student, readers):
    trainer = trainer_of(student, readers, micro_batch=1)

    def never(*_):
        raise torch.OutOfMemoryError

    trainer.step._backward = never
    with pytest.raises(MissingError, match="one sequence does not fit"):
        steps_of(trainer)


@pytest.mark.parametrize(("dtype", "which"), [(torch.float32, signal.SIGTERM), (torch.float16, signal.SIGINT)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    checkpoint, teacher, readers, tmp_path, monkeypatch, caplog, dtype, which
):
    caplog.set_level(logging.INFO, "qat")
    train = replace(TRAIN, steps=7, batch_size=4, eval_every=3, learn=ALL, lr=1e-2, save_every=2)
    monkeypatch.setattr(Scaler, "PATIENCE", 3)  # so that its state changes on the way

    def trained(states, stop_after=None, state=None):
        student, _ = checkpoints.load(checkpoint, teacher, replace(tiny.FP32, dtype=dtype), latents=True)
        trainer = trainer_of(student, readers, train=train, dtype=dtype)
        if state is not None:
            trainer.restore(state, rows[: state.facts["logged"]])

        def report(row):
            if row["step"] == stop_after and "loss" in row:
                os.kill(os.getpid(), which)

        trainer.run(report, lambda: None, states)
        end = trainer.state().tensors  # moments, scaler and random state too
        return trainer.history.rows, parameters_of(student) | {name: value.clone() for name, value in end.items()}

    rows, expected = trained(States(tmp_path / "whole", 2, WHOSE))
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["state-00000006", "state-00000007"]
    with pytest.raises(KeyboardInterrupt):
        trained(States(tmp_path / "cut", 2, WHOSE), stop_after=4)
    state = States(tmp_path / "cut", 2, WHOSE).newest()
    assert state.step == 5  # the step after the signal
    assert state.tensors["scaler.scale"] == (2**17 if dtype == torch.float16 else 1)
    again, found = trained(States(tmp_path / "cut", 2, WHOSE), state=state)
    assert again == rows
    assert caplog.messages[-1].startswith("distillation: 2 of 7 steps in ")
    assert all(value.equal(found[name]) for name, value in expected.items())


def test_a_state_is_written_while_training_goes_on_and_as_it_was_then(student, readers, tmp_path, monkeypatch):
    states, going_on, trainer = States(tmp_path, 2, WHOSE), threading.Event(), trainer_of(student, readers)
    write = states._write
    monkeypatch.setattr(states, "_write", lambda state: (going_on.wait(10), write(state)))
    steps_of(trainer)
    then, trainer.history.step = {p.name: p.value.clone() for p in trainer.learners.parameters}, 1
    states.save(trainer.state())
    steps_of(trainer)  # the next step, before a byte is on disk
    assert states.newest() is None
    going_on.set()
    states.wait()
    found = states.newest().tensors
    assert all(torch.equal(found[f"parameter.{name}"], value) for name, value in then.items())
    assert not all(torch.equal(p.value, then[p.name]) for p in trainer.learners.parameters)


def test_batches_are_the_ranks_rows_of_each_step_from_any_step_on(student, readers):
    whole = [batch for (batch,) in trainer_of(student, readers).batches(0)]
    assert len(whole) == TRAIN.steps and [len(batch.input_ids) for batch in whole] == [12] * 3
    trainer = trainer_of(student, readers)
    parts = []
    for rank in range(5):
        trainer.ranks = Ranks(rank, 5)
        parts.append([batch for (batch,) in trainer.batches(1)])
    for step, batch in enumerate(whole[1:]):
        assert torch.equal(torch.cat([part[step].input_ids for part in parts]), batch.input_ids)
        assert torch.equal(torch.cat([part[step].topk_logprobs for part in parts]), batch.topk_logprobs)


def exact_targets(teacher, reader):
    """The same rows with the teacher's log-probabilities as they were before they were stored in 16 bits."""
    model = teacher.load(torch.float64, tiny.CPU)

    def batch(rows, pinned=False):
        stored = CacheReader.batch(reader, rows, pinned)
        logprobs = model(**stored.inputs()).logits[:, :-1].log_softmax(-1).gather(-1, stored.topk_ids)
        assert 0 < (logprobs - stored.topk_logprobs).abs().max() < 0.01
        return replace(stored, stored=stored.stored | {"topk_logprobs": logprobs.float()})

    found = copy.copy(reader)
    found.batch = batch
    return found


@pytest.mark.parametrize("kind", [LossKind.topk_kl, LossKind.bucket_kl])
def test_targets_stored_in_16_bits_train_as_exact_ones(checkpoint, teacher, readers, kind):
    """Without measurable loss: held-out losses within 0.01 %, less than what another order makes."""
    loss = Loss(kind, 2.0 if kind is LossKind.topk_kl else 1.0)
    train = TrainConfig(steps=15, batch_size=8, lr=5e-3, eval_every=15)

    def trained(reader, seed=0):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        trainer = trainer_of(student, (reader, readers[1]), train=train, loss=loss)
        trainer.seed = seed
        return trainer.run(lambda row: None, lambda: None)

    as_stored, exact = trained(readers[0]), trained(exact_targets(teacher, readers[0]))
    reordered = trained(readers[0], seed=1)
    assert exact.loss_final < 0.9 * exact.loss_initial
    assert (
        abs(as_stored.kd_loss_final - exact.kd_loss_final)
        < 1e-4 * exact.kd_loss_final
        < abs(reordered.kd_loss_final - exact.kd_loss_final)
    )


@pytest.mark.parametrize("name", ["indices", "codebook"])
def test_a_state_of_another_student_is_refused(checkpoint, teacher, readers, name):
    """Scales that learned under some indices are worth nothing under others, and no shape would tell."""
    train = replace(TRAIN, learn=LearnConfig(codebooks=0.0))
    student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
    state = trainer_of(student, readers, train=train).state()
    state = replace(state, facts=state.facts | {"logged": 0})
    other, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
    module = list(quantized(other).values())[-1]
    getattr(module, name).data.view(-1)[0] += 1
    with pytest.raises(ArtifactError, match="belongs to a student with other indices"):
        trainer_of(other, readers, train=train).restore(state, [])
    trainer_of(student, readers, train=train).restore(state, [])


def test_training_that_had_ended_removes_what_a_kill_left_of_older_states(student, readers, tmp_path):
    """Killed between the last state's appearance and the removal of the one before it, and gone on with."""
    trainer = trainer_of(student, readers, train=replace(TRAIN, steps=2, save_every=1))
    trainer.run(lambda row: None, lambda: None, States(tmp_path, 2, WHOSE))
    assert len(list(tmp_path.iterdir())) == 2
    trainer.run(lambda row: None, lambda: None, States(tmp_path, 1, WHOSE))
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000002"]


def test_a_damaged_state_is_passed_over(student, readers, tmp_path, caplog):
    states = States(tmp_path, 3, WHOSE)
    trainer = trainer_of(student, readers)
    for step in (1, 2):
        trainer.history.step = step
        states.save(trainer.state())
    states.wait()
    path = tmp_path / "state-00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert states.newest().step == 1 and "going on from the state before it" in caplog.text


def test_a_state_of_another_run_is_neither_restored_nor_deleted(tmp_path, caplog):
    def saved(step, value, **other):
        states = States(tmp_path, 1, WHOSE | other)
        states.save(State(step, {"x": torch.full((2,), float(value), dtype=torch.float32)}, {}))
        states.wait()
        return states

    saved(7, 7, started="2026-11-28T10:00:00+0000")
    saved(8, 8, run_id="SR-002")
    for step in (1, 2):
        states = saved(step, step)
    assert states.newest().step == 2 and caplog.text.count("is of another run") == 2
    assert [path.name[-1] for path in sorted(tmp_path.glob("state-*"))] == ["2", "7", "8"]
    assert States(tmp_path, 1, WHOSE | {"run_id": "SR-003"}).newest() is None


def test_training_lowers_the_held_out_loss_and_tells_of_it(student, readers):
    rows, best = [], []
    train = TrainConfig(steps=25, batch_size=8, lr=5e-3, eval_every=10)
    trainer = trainer_of(student, readers, train=train)
    history = trainer.run(rows.append, lambda: best.append(len(rows)))
    assert history.kd_loss_best < 0.9 * history.kd_loss_initial
    assert history.kd_loss_final == pytest.approx(trainer.held_out().kd_loss, rel=1e-5)
    looks = [(row["step"], row["kd_loss"]) for row in rows if "kd_loss" in row]
    assert [step for step, _ in looks] == [0, 10, 20, 25]
    assert history.kd_loss_initial == looks[0][1] and history.kd_loss_final == looks[-1][1]
    assert (history.kd_loss_best, history.best_step) == min((kd, step) for step, kd in looks)
    assert [row["held_out_loss"] for row in rows if "held_out_loss" in row] == pytest.approx([kd for _, kd in looks])
    lowest_so_far = sum(kd < min([k for _, k in looks[:i]], default=float("inf")) for i, (_, kd) in enumerate(looks))
    assert len(best) == lowest_so_far
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 26)) and history.rows == rows
    assert history.tokens == 25 * 8 * 32 and history.seconds > 0


@pytest.mark.parametrize("kind", [kind for kind in LossKind if not kind.needs_answers])
def test_held_out_are_the_loss_that_is_trained_and_the_run_logs_measure(student, teacher, readers, kind):
    batch = readers[1].batch(torch.arange(readers[1].rows))
    logits = tiny.exact_logits(teacher, student, tiny.exact_weights(student), batch.input_ids).detach()
    beside = teacher.load(torch.float32, tiny.CPU) if kind is LossKind.full_kl else None
    loss = Loss(kind, 2.0 if kind is LossKind.topk_kl else 1.0, teacher=beside)
    trained, measured = (exact_loss(one, teacher, batch, logits).item() for one in (kind, LossKind.topk_kl))
    for micro_batch in (1, 12):
        found = trainer_of(student, readers, loss=loss, micro_batch=micro_batch).held_out()
        assert found.loss == pytest.approx(trained, rel=1e-4)
        assert found.kd_loss == pytest.approx(measured, rel=1e-4)


def test_the_best_student_is_the_one_whose_trained_loss_is_lowest(student, readers, monkeypatch):
    looks = iter([HeldOut(1.0, 2.0), HeldOut(0.8, 2.5), HeldOut(0.9, 1.5)])
    trainer, best = trainer_of(student, readers, train=replace(TRAIN, steps=2, eval_every=1)), []
    monkeypatch.setattr(trainer, "held_out", lambda: next(looks))
    history = trainer.run(lambda row: None, lambda: best.append(trainer.history.step))
    assert best == [0, 1] and history.best_step == 1
    assert (history.loss_initial, history.loss_best, history.loss_final) == (1.0, 0.8, 0.9)
    assert (history.kd_loss_initial, history.kd_loss_best, history.kd_loss_final) == (2.0, 2.5, 1.5)


CAP = 5.0


@pytest.fixture(scope="module")
def capped():
    """A model that caps its logits: what its head does is no product."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma2Config(vocab_size=512, head_dim=16, final_logit_softcapping=CAP, **shape)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("kind", [kind for kind in LossKind if not kind.needs_answers])
@pytest.mark.parametrize("product", [True, False])
def test_the_head_gives_the_loss_and_gradient_of_whole_logits(teacher, capped, readers, kind, hard, product):
    model = teacher.load(torch.float32, tiny.CPU) if product else capped
    if product:
        use(model, FAST)
    batch = readers[1].batch(torch.arange(10))
    draw = torch.Generator().manual_seed(0)
    hidden, beside = (torch.randn(310, 64, generator=draw) for _ in range(2))
    weight = torch.rand(310, generator=draw)
    temperature = 2.0 if kind is LossKind.topk_kl else 1.0
    loss = Loss(kind, temperature, hard, model if kind is LossKind.full_kl else None)
    head = Head(model, loss)
    ids, logprobs = batch.topk_ids.flatten(0, 1), batch.topk_logprobs.flatten(0, 1)
    value, grad = head.backward(hidden, ids, logprobs, weight, beside if loss.teacher else None)
    exact, E = hidden.double().requires_grad_(), model.lm_head.weight.double()
    logits, theirs = (x @ E.T if product else CAP * (x @ E.T / CAP).tanh() for x in (exact, beside.double()))
    assert torch.allclose(head.logits(hidden, ids).double(), logits.gather(-1, ids), atol=1e-3)
    q = logits.softmax(-1)
    if kind is LossKind.full_kl:
        p = theirs.softmax(-1)
        expected = (p * (p / q).log()).sum(-1)
    elif kind is LossKind.topk_kl:
        p, at = (logprobs.double() / 2).softmax(-1), (logits.gather(-1, ids) / 2).softmax(-1)
        expected = 4 * (p * (p / at).log()).sum(-1)
    else:
        p, at = logprobs.double().exp(), q.gather(-1, ids)
        p, at = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp_min(1e-6)], -1) for x in (p, at))
        expected = (p * (p / at).log()).sum(-1)
    expected = expected - hard * q.gather(-1, ids[:, :1])[:, 0].log()
    found = head.losses(hidden, ids, logprobs, beside if loss.teacher else None)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    total = (expected * weight).sum()
    total.backward()
    assert value == pytest.approx(total.item(), rel=1e-4)
    assert torch.allclose(grad.double(), exact.grad, rtol=1e-3, atol=1e-4 * exact.grad.abs().max())


@pytest.mark.parametrize(("product", "sizes"), [(True, [100, 100, 100, 10]), (False, [25] * 12 + [10])])
def test_the_head_needs_no_more_than_a_chunk_of_logits(teacher, capped, readers, monkeypatch, product, sizes):
    from qat.distill import head as module

    model = teacher.load(torch.float32, tiny.CPU) if product else capped
    if product:
        use(model, FAST)
    head = Head(model, Loss(LossKind.bucket_kl))
    batch = readers[1].batch(torch.arange(10))
    given = torch.randn(310, 64), batch.topk_ids.flatten(0, 1), batch.topk_logprobs.flatten(0, 1), torch.ones(310)
    whole = head.backward(*given, None)
    found, real = [], head.head.differentiable
    monkeypatch.setattr(head.head, "differentiable", lambda hidden: (found.append(len(hidden)), real(hidden))[1])
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * 512 * 100)
    parts = head.backward(*given, None)
    assert found == sizes
    assert parts[0] == pytest.approx(whole[0].item(), rel=1e-5) and torch.allclose(parts[1], whole[1], atol=1e-6)
