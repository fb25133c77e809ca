"""Two processes, each with the states of its share of the layers: what one process learns, to rounding."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat import checkpoints
from qat.artifacts import open_artifact
from qat.cache.reader import CacheReader
from qat.config import LearnConfig, LossKind, ModeConfig, TrainConfig
from qat.distill.loss import Loss
from qat.distill.parameters import Learners
from qat.distill.state import State
from qat.distill.trainer import Trainer
from qat.errors import ConfigError
from qat.processes import PLACE, Ranks, joined
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear, quantized
from qat.quant.shards import buckets, shares, units
from tests import launching, tiny

BOTH = ModeConfig(name="e2e", mlp=True, attn=True)
LEARN = LearnConfig(scales=1.0, codebooks=1.0, latent=1.0, norms=1.0)
TRAIN = TrainConfig(steps=4, batch_size=12, lr=1e-4, eval_every=4, grad_clip=1.0, learn=LEARN)

CUT = replace(TRAIN, batch_size=11, lengths=[8, 32], shares=[2.0, 1.0])  # so that processes have unlike micro-batches


def trainer_of(folder: Path, ranks: Ranks, cut: bool = False, **machine) -> Trainer:
    teacher = tiny.teacher_in(folder)
    student, _ = checkpoints.load(folder / "start", teacher, tiny.FP32, latents=True)
    layers = {name: ("mlp" if ".mlp." in name else "attn", module) for name, module in quantized(student).items()}
    cached = open_artifact(folder / "cache")
    readers = CacheReader(cached, "train"), CacheReader(cached, "eval")
    loss, train = Loss(LossKind.bucket_kl), TRAIN
    if cut:
        loss, train = Loss(LossKind.full_kl, teacher=teacher.load(torch.float32, tiny.CPU)), CUT
    return Trainer(student, layers, readers, train, BOTH, loss, replace(tiny.FP32, **machine), 0, ranks)


def trained(folder: Path, ranks: Ranks, short: bool = False, **machine) -> tuple[list[dict], State, dict]:
    """Rows, the state, and bytes held of each layer after some steps; `short`: memory runs out in this process."""
    rows, trainer = [], trainer_of(folder, ranks, **machine)
    if short:
        trainer.step._backward = short_of_memory(trainer.step._backward)
    trainer.run(rows.append, lambda: None)
    with trainer.learners.whole():
        if ranks.first:
            place = folder / f"of-{ranks.count}{'-cut' if machine.get('cut') else ''}"
            place.mkdir(exist_ok=True)
            checkpoints.write(trainer.student, place)
    return rows, trainer.state(), {layer: held(module) for layer, module in quantized(trainer.student).items()}


def short_of_memory(real):
    calls = []

    def backward(*args):
        calls.append(1)
        real(*args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError

    return backward


def held(layer: QuantLinear) -> int:
    """Bytes that a process holds of a layer's indices, parts and latent weights."""
    tensors = [layer.indices, layer.latent, *layer.parts().values()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def work(environment: dict[str, str], folder: str, words: dict) -> None:
    """What a process of several does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined(tiny.CPU) as ranks:
        short = words.pop("short", None) == ranks.rank
        if words.pop("restored", False):
            rows, state, bytes_held = [], restored(Path(folder), ranks), {}
        else:
            rows, state, bytes_held = trained(Path(folder), ranks, short, **words)
        told = [rows, state.tensors if ranks.first else {}, bytes_held, state.facts]
        torch.save(told, Path(folder) / f"rank-{ranks.rank}")


def restored(folder: Path, ranks: Ranks) -> State:
    """The state of a training that took over another's."""
    tensors, facts = torch.load(folder / "state", weights_only=True)
    trainer = trainer_of(folder, ranks)
    trainer.restore(State(TRAIN.steps, tensors, facts), [])
    return trainer.state()


def together(folder: Path, count: int = 2, **words) -> list[list]:
    """What each of several processes leaves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, running = launching.processes(), []
    for rank in range(count):
        told = dict(zip(PLACE, map(str, (rank, count, rank)), strict=True))
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running.append(context.Process(target=work, args=(told, str(folder), dict(words))))
        running[-1].start()
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def prepared(folder, cache, checkpoint):
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(cache.folder)
    return folder


@pytest.fixture(scope="module")
def alone(prepared):
    return trained(prepared, Ranks())


@pytest.fixture(scope="module")
def two(prepared):
    """What each of two processes leaves."""
    return together(prepared)


@pytest.mark.parametrize("short", [False, True])
def test_two_processes_learn_what_one_does(prepared, alone, two, short):
    first, second = together(prepared, short=1) if short else two
    expected, state, _ = alone
    for ours, theirs in zip(first[0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert first[0] == second[0]
    assert first[1].keys() == state.tensors.keys()
    for name, value in state.tensors.items():
        if name.startswith("parameter"):
            step = 1e-4 * value.square().mean().sqrt()
            assert (first[1][name] - value).abs().mean() < 0.05 * step, name


def test_processes_with_rows_of_several_lengths_learn_what_one_does(prepared):
    expected, first = trained(prepared, Ranks(), cut=True)[0], together(prepared, cut=True, micro_batch=1)
    assert len({tuple(map(str, one[0])) for one in first}) == 1
    for ours, theirs in zip(first[0][0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_state_is_that_of_any_number_of_processes(prepared, alone, two):
    (_, tensors, _, facts), expected = two[0], alone[1]
    torch.save([tensors, facts], prepared / "state")
    in_one = restored(prepared, Ranks()).tensors
    torch.save([expected.tensors, expected.facts], prepared / "state")
    in_two = together(prepared, restored=True)[0][1]
    for given, taken in ((tensors, in_one), (expected.tensors, in_two)):
        assert given.keys() == taken.keys()
        assert all(torch.equal(given[name], value) for name, value in taken.items())


def test_more_processes_than_parts_are_refused(prepared, teacher, readers):
    student, _ = checkpoints.load(prepared / "start", teacher, tiny.FP32, latents=True)
    layers = quantized(student)
    count = len(units(layers)) + 1
    with pytest.raises(ConfigError, match=rf"{count - 1} parts of a model for {count} processes: use fewer"):
        Learners(student, layers, LEARN, tiny.FP32, False, Ranks(0, count))


def test_three_processes_share_all_states_and_the_checkpoint_is_whole(prepared, alone):
    found = together(prepared, 3)
    for layer, bytes_ in alone[2].items():
        assert sorted(one[2][layer] for one in found) == [0, 0, bytes_]
    most = max(sum(one[2].values()) for one in found)
    assert most < 0.5 * sum(alone[2].values())
    for name in ("tables", "latent"):
        ours, theirs = (
            checkpoints.native.tensor_files.read(prepared / f"of-{count}" / f"{name}.safetensors", None, "")
            for count in (3, 1)
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not key.endswith("indices"):
                assert torch.allclose(ours[key], value, rtol=1e-3, atol=1e-4), key


def test_shares_are_even_and_keep_units_together():
    def layer(outputs):
        return QuantLinear(Codebook(2, 1), outputs, 16)

    sizes = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "mlp.up_proj": 64, "mlp.down_proj": 32}
    layers = {f"layers.{n}.{name}": layer(size) for n in range(5) for name, size in sizes.items()}
    layers["lm_head"] = layer(300)
    found = units(layers)
    assert [len(unit) for unit in found] == [2] * 10 + [1]
    for count in (2, 3, 4):
        owned = shares(found, count)
        weights = [sum(one.outputs for unit in share for one in unit) for share in owned]
        owners = {layer: rank for rank, share in enumerate(owned) for unit in share for layer in unit}
        sent = buckets(found, owners, count)
        assert sorted(id(one) for bucket in sent for one in bucket.layers) == sorted(map(id, layers.values()))
        assert all(owners[unit[0]] == rank for bucket in sent for rank, unit in bucket.units.items())
        assert sum(weights) == 5 * 144 + 300 and max(weights) <= max(300, 1.15 * sum(weights) / count)
        assert sorted(id(one) for share in owned for unit in share for one in unit) == sorted(map(id, layers.values()))
