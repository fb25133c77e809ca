"""Adapters in training: against one exact backward pass, on a student that stays as it is, gone on with to the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qat import checkpoints
from qat.checkpoints.adapters import CONFIG, FILE
from qat.config import LossKind, ModeConfig, TrainConfig
from qat.distill.loss import Loss
from qat.distill.optim import Optimizer
from qat.distill.state import State
from qat.errors import ArtifactError, ConfigError
from qat.quant.adapter import adapters
from qat.quant.linear import quantized
from tests import tiny
from tests.distill.test_trainer import TRAIN, exact_loss, grads_of, parameters_of, steps_of, trainer_of

LORA = ModeConfig(name="lora", mlp=True, attn=True, rank=3, alpha=6.0)
MLP_LORA = ModeConfig(name="lora", mlp=True, attn=False, rank=3, alpha=6.0)
BUCKET = Loss(LossKind.bucket_kl)
IDS = torch.arange(60).reshape(3, 20)


def moved(student) -> None:
    """Adapters with something in B, so that both matrices get gradients."""
    for number, one in enumerate(adapters(student).values()):
        with torch.no_grad():
            one.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))


def exact(teacher, student, ids):
    """Logits in float64 by the teacher's own layers, their weights those of a student and its adapters spelled out."""
    pairs = {
        name: [m.detach().double().requires_grad_() for m in (one.A, one.B)] for name, one in adapters(student).items()
    }
    weights = {}
    for name, module in quantized(student).items():
        weights[f"{name}.weight"] = module.weight(torch.float64)
        if name in pairs:
            A, B = pairs[name]
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + 6.0 / 3 * B @ A
    return torch.func.functional_call(teacher.load(torch.float64, tiny.CPU), weights, (ids,)).logits, pairs


def saved(student, checkpoint, teacher, folder):
    checkpoints.save(student, folder, checkpoints.heritage(checkpoints.manifest(checkpoint, teacher, tiny.FP32)))
    return folder


@pytest.fixture
def adapted(student, readers):
    """A student with adapters that add something."""
    trainer_of(student, readers, mode=LORA)
    moved(student)
    return student.requires_grad_(False)


@pytest.mark.parametrize("machine", [{"micro_batch": 5}, {"micro_batch": 12, "checkpointing": True}])
def test_gradients_are_those_of_one_exact_backward_pass(student, teacher, readers, machine):
    trainer = trainer_of(student, readers, mode=LORA, loss=BUCKET, **machine)
    moved(student)
    batch = readers[0].batch(readers[0].training_rows(0, TRAIN.batch_size, 0))
    logits, pairs = exact(teacher, student, batch.input_ids)
    loss = exact_loss(LossKind.bucket_kl, teacher, batch, logits)
    loss.backward()
    (figures,) = steps_of(trainer)
    found = grads_of(trainer)
    assert figures.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.keys() == {f"{name}.{matrix}" for name in quantized(student) for matrix in "AB"}
    for name, (A, B) in pairs.items():
        torch.testing.assert_close(found[f"{name}.A"].double(), A.grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[f"{name}.B"].double(), B.grad, rtol=1e-3, atol=1e-7)


def test_at_first_they_add_nothing_and_the_student_under_them_stays(student, readers):
    before, logits = parameters_of(student), student(IDS).logits
    trainer = trainer_of(student, readers, TrainConfig(steps=30, batch_size=8, lr=1e-2), MLP_LORA)
    assert torch.equal(student(IDS).logits, logits)
    first = trainer.held_out().loss
    steps_of(trainer, 30)
    assert trainer.held_out().loss < 0.98 * first
    after = parameters_of(student)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.split(".")[3] for name in adapters(student)} == {"mlp"}


def test_what_is_drawn_is_as_peft_draws_it_and_depends_on_the_seed(student, readers):
    trainer_of(student, readers, mode=LORA)
    drawn = {name: one.A.detach().clone() for name, one in adapters(student).items()}
    for name, A in drawn.items():
        bound = torch.nn.init.kaiming_uniform_(torch.empty_like(A), a=5**0.5).shape[1] ** -0.5
        assert float(A.abs().max()) <= bound and float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.2), name
    assert len({value.sum().item() for value in drawn.values()}) == len(drawn)


def test_their_rate_is_absolute(student, readers):
    trainer = trainer_of(student, readers, TrainConfig(lr=2e-3), LORA)
    groups = Optimizer(trainer.learners.parameters, TrainConfig(lr=2e-3), tiny.CPU).adam.param_groups
    assert [float(group["lr"]) for group in groups] == pytest.approx([2e-3])


def test_a_checkpoint_has_them_in_pefts_layout(adapted, teacher, checkpoint, tmp_path):
    folder = saved(adapted, checkpoint, teacher, tmp_path / "best")
    said, stored = json.loads((folder / CONFIG).read_text()), load_file(folder / FILE)
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 3, 6.0)
    leaves = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert said["target_modules"] == list(leaves)
    one = adapters(adapted)["model.layers.1.mlp.up_proj"]
    assert torch.equal(stored["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"], one.B)
    again, _ = checkpoints.load(folder, teacher, tiny.FP32)
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    for name, one in adapters(again).items():
        assert torch.equal(one.A, adapters(adapted)[name].A) and torch.equal(one.B, adapters(adapted)[name].B)
    assert (
        saved(again, checkpoint, teacher, tmp_path / "again").joinpath(FILE).read_bytes()
        == (folder / FILE).read_bytes()
    )


def test_where_last_parts_of_names_do_not_tell_layers_apart_whole_names_do(adapted, teacher, checkpoint, tmp_path):
    adapted.get_submodule("model.layers.0.mlp.up_proj").adapter = None
    folder = saved(adapted, checkpoint, teacher, tmp_path / "best")
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == sorted(adapters(adapted))
    assert adapters(checkpoints.load(folder, teacher, tiny.FP32)[0]).keys() == adapters(adapted).keys()


@pytest.mark.parametrize(
    ("key", "value"), [("r", 4), ("r", 0), ("lora_alpha", "NaN"), ("lora_alpha", -1), ("peft_type", "IA3")]
)
def test_a_damaged_description_is_refused(adapted, teacher, checkpoint, tmp_path, key, value):
    folder = saved(adapted, checkpoint, teacher, tmp_path / "best")
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | {key: float(value) if value == "NaN" else value}))
    with pytest.raises(ArtifactError):
        checkpoints.adapters.read(checkpoints.load(checkpoint, teacher, tiny.FP32)[0], folder, "make it again")


def test_training_goes_on_with_those_of_a_checkpoint_and_with_no_others(adapted, readers):
    before = {name: one.B.clone() for name, one in adapters(adapted).items()}
    trainer_of(adapted, readers, mode=LORA)
    assert all(torch.equal(one.B, before[name]) for name, one in adapters(adapted).items())
    with pytest.raises(ConfigError, match=r"mode.rank=3 mode.alpha=6, which training with mode.rank=4 mode.alpha=6"):
        trainer_of(adapted, readers, mode=ModeConfig(name="lora", mlp=True, attn=True, rank=4, alpha=6.0))
    with pytest.raises(ConfigError, match=r"use mode=lora mode.rank=3 mode.alpha=6"):
        trainer_of(adapted, readers, mode=ModeConfig(name="mlp", mlp=True, attn=False))


def test_a_state_goes_on_to_the_same_bits(student, teacher, checkpoint, readers):
    whole = trainer_of(student, readers, mode=LORA)
    steps_of(whole, 2)
    whole.history.step = 2
    state = whole.state()
    state = State(state.step, {name: value.detach().clone() for name, value in state.tensors.items()}, state.facts)
    steps_of(whole, 1)
    other = checkpoints.load(checkpoint, teacher, tiny.FP32)[0]
    resumed = trainer_of(other, readers, mode=LORA)
    resumed.restore(state, [])
    steps_of(resumed, 1)
    for one, two in zip(adapters(student).values(), adapters(other).values(), strict=True):
        assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
