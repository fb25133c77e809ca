"""Training that comes to nothing has failed, and says why."""

from dataclasses import replace

import pytest
import torch

from qat import checkpoints
from qat.config import LossKind
from qat.distill.loss import Loss
from qat.errors import NumericsError
from tests import tiny
from tests.distill.test_trainer import TRAIN, parameters_of, steps_of, trainer_of


def ended(trainer):
    """The sentence that training ends with."""
    with pytest.raises(NumericsError) as raised:
        trainer.run(lambda row: None, lambda: None)
    return str(raised.value)


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-38, 1e-30, 1e20, 1e38])
def test_a_temperature_at_which_nothing_can_be_learnt(student, readers, temperature):
    before = parameters_of(student)
    said = ended(trainer_of(student, readers, loss=Loss(LossKind.topk_kl, temperature)))
    assert "loss.temperature" in said
    assert all(value.equal(before[name]) for name, value in parameters_of(student).items())


@pytest.mark.parametrize("change", [{"lr": 1e-30}, {"lr": 1e-300}, {"grad_clip": 1e-38}, {"grad_clip": 1e-300}])
def test_rates_that_are_rounded_away(student, readers, change):
    said = ended(trainer_of(student, readers, replace(TRAIN, **change)))
    assert said.startswith("3 steps have changed nothing") and "train.lr" in said


@pytest.mark.parametrize(("bad", "fails"), [(1, False), (2, False), (3, True), (4, True)])
def test_steps_of_which_hardly_any_counts(student, readers, bad, fails):
    trainer = trainer_of(student, readers, replace(TRAIN, steps=4, eval_every=100))
    real, calls = trainer.step._attempt, []

    def spoil(*args):
        real(*args)
        calls.append(1)
        if len(calls) <= bad:
            trainer.step.total.fill_(torch.nan)

    trainer.step._attempt = spoil
    if fails:
        assert ended(trainer).startswith(f"only {4 - bad} of 4 steps counted: in the others the loss or its gradient")
    else:
        assert trainer.run(lambda row: None, lambda: None).skipped == bad


def test_a_failed_training_that_is_gone_on_with_fails_again(checkpoint, teacher, readers, student):
    train = replace(TRAIN, lr=1e-30)
    first = trainer_of(student, readers, train)
    ended(first)
    again = trainer_of(checkpoints.load(checkpoint, teacher, tiny.FP32)[0], readers, train)
    again.restore(first.state(), [])
    assert ended(again).startswith("3 steps have changed nothing")


class Masked:
    """A split of which only some rows have a position that counts."""

    def __init__(self, reader, counts):
        self._reader, self._counts = reader, counts
        self.rows, self.meta = reader.rows, reader.meta

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def batch(self, rows, pinned=False):
        batch = self._reader.batch(rows, pinned)
        batch.stored["loss_mask"] *= self._counts(rows)[:, None].to(torch.uint8)
        return batch

    def stream(self, order, device):
        yield from map(self.batch, order)


def test_a_batch_in_which_nothing_counts_is_no_step(student, readers):
    training = Masked(readers[0], lambda rows: rows < 0)
    trainer = trainer_of(student, readers)
    trainer.training = training
    before = parameters_of(student)
    (figures,) = steps_of(trainer)
    assert figures.skipped and all(value.equal(before[name]) for name, value in parameters_of(student).items())
    assert ended(trainer).startswith("only 0 of 3 steps counted")


def test_a_held_out_split_in_which_nothing_counts(student, readers):
    trainer = trainer_of(student, readers)
    trainer.held_out_rows = Masked(readers[1], lambda rows: rows < 0)
    assert ended(trainer).startswith("no position of the held-out split counts")
