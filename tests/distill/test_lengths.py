"""Steps whose rows are cut into several lengths: the mean over all their tokens, the same on any machine."""

import os
import signal
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qat import checkpoints
from qat.cache.batch import Batch
from qat.cli import arguments, main
from qat.config import LossKind
from qat.distill.lengths import pattern
from qat.distill.loss import Loss
from qat.distill.state import States
from qat.distill.trainer import cuts
from qat.errors import ConfigError
from qat.fidelity import Sample
from qat.forward import hidden_states
from qat.processes import Ranks
from tests import tiny
from tests.distill.test_trainer import TRAIN, WHOSE, grads_of, parameters_of, steps_of, trainer_of

MIXED = replace(TRAIN, lengths=[8, 32], shares=[2.0, 1.0])  # rows of the cache have 32 tokens


@pytest.fixture
def beside(teacher):
    return Loss(LossKind.full_kl, teacher=teacher.load(torch.float32, tiny.CPU))


def test_lengths_have_their_shares_and_are_spread_over_a_step():
    found = pattern([128, 512, 2048], [4, 2, 2], 16, 2048)
    assert Counter(found) == {128: 8, 512: 4, 2048: 4}
    assert all(Counter(found[half : half + 8]) == {128: 4, 512: 2, 2048: 2} for half in (0, 8))
    assert Counter(pattern([64, 128], [], 7, 128)) in ({64: 4, 128: 3}, {64: 3, 128: 4})
    assert pattern([], [], 3, 64) == [64] * 3


@pytest.mark.parametrize("shares", [[1.0, 9.0], [3.3, 1.1, 2.2], [1.0, 1.0, 1.0]])
def test_shares_are_met_to_less_than_a_row(shares):
    lengths = [16, 32, 64][: len(shares)]
    counts = Counter(pattern(lengths, shares, 50, 64))
    assert sum(counts.values()) == 50
    assert all(abs(counts[n] - 50 * s / sum(shares)) < 1 for n, s in zip(lengths, shares, strict=True))


def test_a_length_that_rows_are_no_multiple_of_or_that_gets_none_is_refused():
    with pytest.raises(ConfigError, match="no whole number of 48"):
        pattern([48], [], 4, 128)
    with pytest.raises(ConfigError, match=r"the share of 128 is less than one of train\.batch_size=4"):
        pattern([64, 128], [99.0, 1.0], 4, 128)


def test_a_piece_is_a_row_of_its_own(teacher):
    """What a model says of a piece is what it says of each document in it alone."""
    model = teacher.load(torch.float32, tiny.CPU)
    starts = torch.zeros(2, 24, dtype=torch.uint8)
    starts[:, 0] = starts[0, 5] = starts[0, 18] = starts[1, 8] = 1
    stored = {"input_ids": torch.randint(256, (2, 24)).int(), "document_starts": starts, "loss_mask": 1 - starts[:, 1:]}
    batch = Batch(stored, 512, True)
    pieces = batch.cut(8)
    hidden = hidden_states(model, pieces.inputs()).unflatten(0, (6, 7))
    assert pieces.loss_mask.shape == (6, 7)
    for number in range(6):
        row, begin = divmod(8 * number, 24)
        edges = [0, *(at for at in range(1, 8) if starts[row, begin + at]), 8]
        for first, end in pairwise(edges):
            alone = stored["input_ids"][row, begin + first : begin + end].long()[None]
            own = model.model(alone).last_hidden_state[0]
            assert torch.allclose(hidden[number, first : end - 1], own[: end - first - 1], atol=1e-5)
            assert pieces.loss_mask[number, first : end - 1].all()
            assert not (end < 8 and pieces.loss_mask[number, end - 1])
    assert batch.cut(24) is batch


def exact(teacher, student, parts, trainer):
    """The loss of the first step, float64: a mean over all tokens of pieces that are read one by one."""
    model = teacher.load(torch.float64, tiny.CPU)
    rows, losses = trainer.training.training_rows(0, TRAIN.batch_size, 0), []
    for row, length in zip(rows, 4 * [32] + 8 * [8], strict=True):  # each row has one document
        ids = trainer.training.batch(row[None]).input_ids[0]
        for piece in ids.split(length):
            p = model(piece[None]).logits[0, :-1].softmax(-1)
            q = tiny.exact_logits(teacher, student, parts, piece[None])[0, :-1].softmax(-1)
            losses.append((p * (p / q).log()).sum(-1))
    return torch.cat(losses).mean()


def test_loss_and_gradient_are_the_mean_over_all_tokens(checkpoint, teacher, readers, beside):
    trainers = {}
    for size in (12, 2, 1):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        trainers[size] = trainer_of(student, readers, MIXED, loss=beside, micro_batch=size)
    parts = tiny.exact_weights(student)
    loss = exact(teacher, student, parts, trainers[1])
    loss.backward()
    for size, trainer in trainers.items():
        (figures,), grads = steps_of(trainer), grads_of(trainer)
        assert figures.loss == pytest.approx(loss.item(), rel=1e-4)
        for layer, values in parts.items():
            for name, value in values.items():
                found, most = grads[f"{layer}.{name}"].double(), value.grad.abs().max()
                assert torch.allclose(found, value.grad, rtol=1e-2, atol=2e-3 * most), (size, layer, name)


def test_micro_batches_have_as_many_tokens_whatever_their_length(student, readers, beside):
    trainer = trainer_of(student, readers, MIXED, loss=beside, micro_batch=2)
    real, shapes = trainer.step._backward, []

    def seen(inputs, outputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        real(inputs, outputs)

    trainer.step._backward = seen
    steps_of(trainer)
    assert Counter(shapes) == {(2, 32): 2, (8, 8): 4}


def test_rows_of_few_documents_are_cut_least(student, readers, beside, monkeypatch):
    training, _ = readers
    trainer = trainer_of(student, readers, MIXED, loss=beside)
    few = set(training.training_rows(0, 12, 0)[2::3].tolist())  # as many as stay whole
    real = type(training).batch

    def batch(self, rows, pinned=False):
        found = real(self, rows, pinned)
        starts = found.stored["document_starts"].clone()
        starts[:, 20] = torch.tensor([row not in few for row in rows.tolist()]).byte()
        return replace(found, stored=found.stored | {"document_starts": starts})

    monkeypatch.setattr(type(training), "batch", batch)
    with closing(trainer.batches(0)) as batches:
        whole, cut = next(batches)
    wanted = torch.stack([training.batch(torch.tensor([row])).input_ids[0] for row in sorted(few)])
    assert whole.input_ids.shape == (4, 32) and cut.input_ids.shape == (32, 8)
    assert sorted(whole.input_ids.tolist()) == sorted(wanted.tolist())


def test_processes_share_every_length_and_make_the_same_step(student, readers, beside):
    trainer = trainer_of(student, readers, MIXED, loss=beside)
    with closing(trainer.batches(0)) as batches:
        whole = next(batches)
    found = {8: [], 32: []}
    for rank in range(3):
        trainer.ranks = Ranks(rank, 3)
        with closing(trainer.batches(0)) as batches:
            mine = next(batches)
        assert [batch.input_ids.shape[1] for batch in mine] == [32, 8]
        for batch in mine:
            found[batch.input_ids.shape[1]].append(batch.input_ids)
    for batch in whole:
        assert torch.equal(torch.cat(found[batch.input_ids.shape[1]]), batch.input_ids)


def test_a_stopped_run_goes_on_to_the_same_bits(checkpoint, teacher, readers, beside, tmp_path):
    states = States(tmp_path, 2, WHOSE)

    def trained(stop_after=None, state=None):
        student, _ = checkpoints.load(checkpoint, teacher, tiny.FP32)
        trainer = trainer_of(student, readers, replace(MIXED, steps=5), loss=beside)
        if state is not None:
            trainer.restore(state, [])

        def report(row):
            if row["step"] == stop_after and "loss" in row:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.run(report, lambda: None, states if stop_after else None)
        return parameters_of(student), trainer.history.tokens

    expected, tokens = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(stop_after=2)
    assert states.newest().step == 3  # the step after the signal
    found, again = trained(state=states.newest())
    assert again == tokens == 5 * 12 * 32
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_passes_are_looked_at_in_every_length(readers):
    samples = [Sample.of_rows(rows) for rows in cuts(readers[0], MIXED)]
    assert [sample.shape for sample in samples] == [(8, True), (32, True)]
    assert all(sample.recorded is None for sample in samples[:1])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train.lengths=[32]", "train.lengths needs loss=full_kl loss.hard=0"),
        ("loss=full_kl loss.hard=1 train.lengths=[32]", "train.lengths needs loss=full_kl loss.hard=0"),
        ("loss=full_kl train.lengths=[48]", "train.lengths: sequences of 64 tokens are no whole number of 48"),
        ("loss=full_kl train.lengths=[1]", "train.lengths: 1 must be at least 2"),
        ("loss=full_kl train.lengths=[32,64] train.shares=[1]", "train.shares has 1 numbers for 2 of train.lengths"),
        ("loss=full_kl train.lengths=[32,64] train.shares=[1,0]", "train.shares: 0.0 must be above 0"),
        ("loss=full_kl train.lengths=[32,64] train.batch_size=1", "the share of 64 is less than one"),
        ("train.shares=[1]", "train.shares has 1 numbers for 0 of train.lengths"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_anything_starts(tmp_path, line, told):
    with pytest.raises(ConfigError) as refused:
        main.check(arguments.parse(["model=tiny", f"outputs={tmp_path}", *line.split()]))
    assert told in str(refused.value)
