"""What a run takes at least: never more than what is there, and refused by what takes most of it."""

from dataclasses import replace

import psutil
import pytest
import torch
import transformers
import zoo
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qat import capacity, checkpoints, footprint
from qat.cache.batch import Text
from qat.cache.reader import CacheReader
from qat.cli import arguments, main
from qat.config import (
    DataConfig,
    DataSource,
    LearnConfig,
    LossKind,
    ModeConfig,
    QuantConfig,
    Stage,
    TrainConfig,
    WeightConfig,
    WeightFormat,
)
from qat.conversion.moments import gather
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.errors import ConfigError
from qat.footprint import Job, Shapes
from qat.footprint.making import equations, largest_moments
from qat.footprint.training import training
from qat.quant import least_squares
from qat.quant.architectures import Layer, select
from qat.quant.formats import Codebook
from qat.quant.linear import quantized
from tests import tiny

GB = 10**9
BOTH = ModeConfig("e2e", True, True)


@pytest.fixture(scope="module")
def config():
    return main.check(arguments.parse(["model=tiny", "cache.top_k=8", "cache.random=8"])).configs[0]


@pytest.fixture(scope="module")
def large():
    """A model of 14 billion weights, none of them in memory."""
    shape = transformers.LlamaConfig(
        vocab_size=128_000,
        hidden_size=5_120,
        intermediate_size=17_408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shape), shape


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes are free."""

    def free(count, swap=0, gpu=None):
        monkeypatch.setattr(capacity, "host", lambda: (count, 10**12))
        monkeypatch.setattr(capacity, "device", lambda device: gpu)
        monkeypatch.setattr(capacity, "whole", lambda device: gpu)
        monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": swap}))

    return free


def job_of(model, config, prefix=""):
    return Job(select(model, config.quant), config.mode, config.train, prefix)


def needed(config, shapes, jobs, machine=tiny.FP32):
    """What each phase needs at least."""
    found = {}
    for name, parts in footprint.phases(config, shapes, jobs, machine):
        found[name] = max(found.get(name, 0), sum(part.bytes for part in parts if part.least))
    return found


def check(config, shapes, jobs, machine=tiny.FP32):
    footprint.check(config, shapes, lambda _: jobs, machine)


def test_a_run_that_fits_to_the_byte_is_let_through_and_one_byte_less_is_refused(config, large, room):
    model, shape = large
    shapes, jobs = Shapes.of(model, shape), [job_of(model, config)]
    most = int(max(needed(config, shapes, jobs).values()))
    assert most > 50 * GB
    for free, swap in ((most, 0), (most - GB, GB)):
        room(free, swap)
        check(config, shapes, jobs)
    room(most - 1)
    with pytest.raises(ConfigError, match="training needs at least"):
        check(config, shapes, jobs)


def test_the_two_largest_parts_and_the_key_to_change_are_told(config, large, room):
    model, shape = large
    wide = replace(config, quant=replace(config.quant, mlp=replace(config.quant.mlp, rank=2000)))
    wide = replace(wide, stage=Stage.convert, data=DataConfig(name="text", source=DataSource.text))

    def told(free):
        room(free)
        with pytest.raises(ConfigError) as refused:
            footprint.check(wide, Shapes.of(model, shape), lambda changed: [job_of(model, changed)], tiny.FP32)
        return str(refused.value)

    assert f"{2 * 4 * 17_408 * 2000**2 / 1e9:.0f} GB for equations of rank 2000 (quant.mlp.rank) and" in told(8 * GB)
    assert "for embedding, head and norms (model); choose a smaller model, or use a machine with more" in told(8 * GB)
    assert "and 20 GB are free" in told(20 * GB) and "; quant.mlp.rank=250 makes it fit, or" in told(20 * GB)


def test_what_makes_it_fit_is_the_cheapest_that_does(config, large, room):
    """Tried by hand: with those keys the phase fits, and without any one of them it does not."""
    model, shape = large
    learn = replace(config.train.learn, latent=1.0)
    latent = replace(config, stage=Stage.distill, train=replace(config.train, learn=learn))
    latent = replace(latent, data=DataConfig(name="text", source=DataSource.text))
    shapes, machine = Shapes.of(model, shape), replace(tiny.FP32, micro_batch=16)

    def jobs(changed):
        return [job_of(model, changed)]

    def fits(changed, rows):
        found = needed(changed, shapes, jobs(changed), replace(machine, micro_batch=rows))
        return found["training"] <= capacity.host()[0]

    small = needed(latent, shapes, jobs(latent), replace(machine, micro_batch=1))["training"]
    room(int(small))
    assert footprint.remedy(latent, shapes, jobs, machine, "training", True) == ["instance.micro_batch=1"]
    assert fits(latent, 1) and not fits(latent, 2)
    room(int(small / 2))
    keys = footprint.remedy(latent, shapes, jobs, machine, "training", True)
    assert "train.learn.latent=0" in keys and not fits(latent, 1)
    room(GB)
    assert footprint.remedy(latent, shapes, jobs, machine, "training", True) == []


def test_a_run_that_is_only_expected_to_take_more_is_warned_of(config, large, room, caplog):
    model, shape = large
    other = replace(config, stage=Stage.evaluate)
    shapes = Shapes.of(model, shape)
    room(int(needed(other, shapes, [])["evaluation"]))
    footprint.check(other, shapes, lambda _: [], tiny.FP32)
    assert "evaluation is expected to take" in caplog.text and "or use a machine with more" in caplog.text


def test_moments_of_all_experts_of_a_layer_are_counted():
    model, quant = zoo.tiny(transformers.CONFIG_MAPPING["mixtral"]), tiny.QUANT
    layers = select(model, quant)
    for gradients in (False, True):
        found = gather(model, layers, Text(torch.randint(200, (2, 16))).batches(2), gradients)
        whole = sum(moment.nbytes for moment in (*found.inputs.values(), *found.outputs.values()))
        assert 2 * 4 * largest_moments(layers, gradients) == whole  # two decoder layers alike


@pytest.mark.parametrize(
    ("words", "phase", "told"),
    [
        (["train.batch_size=1000000000"], "training", "the sequences of a batch (train.batch_size)"),
        (["data=prompts", "data.answers=1000000000"], "text", "the list of all answers (data.answers)"),
        (["data=questions", "data.documents=1000000000000"], "text", "all answers (data.documents)"),
        (["data.answers=1000000000"], "text", "all answers (data.parts[0].answers)"),
        (["train.batch_size=100000", "instance.micro_batch=100000"], "training", "activations (instance.micro_batch)"),
    ],
)
def test_counts_without_an_end_of_their_own_are_refused_by_their_key(teacher, room, words, phase, told):
    config = main.check(arguments.parse(["model=tiny", "cache.random=8", *words])).configs[0]
    model = teacher.skeleton()
    room(20 * GB)
    machine = replace(tiny.FP32, micro_batch=config.instance.micro_batch)
    with pytest.raises(ConfigError) as refused:
        check(config, Shapes.of(model, teacher.settings()), [job_of(model, config)], machine)
    assert str(refused.value).startswith(f"{phase} needs at least") and told in str(refused.value)


def test_a_gpu_is_asked_for_what_it_must_hold_alone(config, large, room):
    model, shape = large
    shapes, jobs = Shapes.of(model, shape), [job_of(model, config)]
    machine = replace(tiny.FP32, device=torch.device("cuda"), dtype=torch.bfloat16)
    whole = shapes.weights * 2
    room(10**12, gpu=whole - 1)
    with pytest.raises(ConfigError, match="of memory on the GPU"):
        check(config, shapes, jobs, machine)
    room(10**12, gpu=3 * whole)
    check(config, shapes, jobs, machine)
    alone = replace(config, stage=Stage.convert, data=DataConfig(name="text", source=DataSource.text))
    held = needed(alone, shapes, jobs, machine)
    assert max(held.values()) < whole / 4  # decoder layers are read one at a time
    assert max(needed(alone, replace(shapes, streams=False), jobs, machine).values()) > whole
    room(GB // 10, gpu=3 * whole)
    with pytest.raises(ConfigError, match=r"conversion needs at least .* of memory and"):
        check(alone, shapes, jobs, machine)


def test_processes_share_the_states_of_latent_weights(large, config, room):
    model, shape = large
    layers = select(model, QuantConfig("g4", *[WeightConfig(bits=4, format=WeightFormat.grid, group=64)] * 4))
    job = Job(layers, replace(BOTH, embed=True), TrainConfig(learn=LearnConfig(latent=1.0)))

    def parts(devices):
        asked = replace(config, instance=replace(config.instance, devices=devices))
        machine = replace(tiny.FP32, device=torch.device("cuda"), dtype=torch.bfloat16)
        found = next(training(job, asked, Shapes.of(model, shape), machine))
        return {part.what: part.bytes for part in found if not part.host}

    one, four = parts(1), parts(4)
    for what in ("latent weights with their moments", "gradients of the weights", "indices"):
        assert four[what] == pytest.approx(one[what] / 4)
    assert four["the student's weights"] == one["the student's weights"]
    outer = 2 * shape.vocab_size * shape.hidden_size
    assert four["gradients of embedding and head"] == 4 * outer * 3 / 4 and "gradients on their way" not in one
    assert sum(four.values()) < 0.45 * sum(one.values())


def test_what_training_is_said_to_hold_is_there(teacher, cache, config, tmp_path):
    """Each part against the tensors of a trainer that has made a step."""
    folder = tiny.checkpoint_in(tmp_path / "checkpoint", teacher, cache)
    student, manifest = checkpoints.load(folder, teacher, tiny.FP32, latents=True)
    layers, modules = checkpoints.layers_of(manifest), quantized(student)
    train = TrainConfig(steps=1, batch_size=8, learn=LearnConfig(latent=1.0))
    readers = CacheReader(cache, "train"), CacheReader(cache, "eval")
    named = {layer.name: (layer.role, modules[layer.name]) for layer in layers}
    trainer = Trainer(student, named, readers, train, BOTH, Loss(LossKind.bucket_kl), tiny.FP32, 0)
    trainer.run(lambda row: None, lambda: None)
    like = replace(config, cache=replace(config.cache, length=32, top_k=8))
    shapes = Shapes.of(teacher.skeleton(), teacher.settings())
    parts = {part.what: part.bytes for part in next(training(Job(layers, BOTH, train), like, shapes, tiny.FP32))}
    held = dict.fromkeys(("scales", "codebooks", "latent"), 0)
    for parameter in trainer.learners.parameters:
        moments = trainer.optimizer.adam.state[parameter.value]
        held[parameter.kind] += sum(x.nbytes for x in (parameter.value, moments["exp_avg"], moments["exp_avg_sq"]))
    assert parts["latent weights with their moments"] == held["latent"]
    gradients = sum(grad.nbytes for stack in trainer.learners._stacks for grad in stack.grads.values())
    assert 0.9 * (held["scales"] + gradients) < parts["scales with their gradients and moments"]
    assert parts["scales with their gradients and moments"] <= held["scales"] + gradients
    assert parts["gradients of the weights"] <= trainer.learners._weights.sums.nbytes
    model = teacher.load(torch.float32, tiny.CPU)
    assert parts["the student's weights"] == sum(parameter.nbytes for parameter in model.parameters())
    batch = readers[0].batch(torch.arange(8))
    assert parts["the sequences of a batch"] <= sum(tensor.nbytes for tensor in batch.stored.values())


def test_equations_of_a_rank_are_there_at_one_time(monkeypatch):
    layer, seen = Layer("up_proj", "mlp", (48, 40), Codebook(2, 24)), []
    real = least_squares.solver
    monkeypatch.setattr(least_squares, "solver", lambda gram: seen.append(gram.nbytes) or real(gram))
    draw = torch.Generator().manual_seed(0)
    Q, A, B = (torch.randn(*shape, generator=draw) for shape in ((1, 48, 40), (1, 48, 24), (1, 24, 40)))
    least_squares.rows(Q, B, torch.ones(1, 40)), least_squares.columns(Q, A, torch.ones(1, 40))
    assert equations([layer]) == 2 * max(seen)  # and as much for the factors


@pytest.mark.parametrize("stage", ["cache", "evaluate", "export"])
def test_a_stage_that_makes_no_student_needs_no_job(config, large, stage):
    model, shape = large
    other = replace(config, stage=type(config.stage)[stage])
    assert all(count > GB for count in needed(other, Shapes.of(model, shape), []).values())


def test_a_configuration_may_say_something_else_of_each_layer():
    """Or nothing at all: what holds for no whole model counts as none, whatever the architecture."""
    looked_at = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind()
            config.get_text_config()
        except (ValueError, StrictDataclassError):  # no model without settings of its own, or of more than one text
            continue
        shapes, looked_at = Shapes.of(nn.Linear(2, 3), config), looked_at + 1
        assert shapes.weights == 9 and min(shapes.hidden, shapes.inner, shapes.depth, shapes.remembered) >= 0
    assert looked_at > 150


def test_the_packages_own_tasks_ask_less_than_a_micro_batch(config, large):
    """320 answers to weigh, however many rows there is room for; of a task of others nobody knows how many."""
    model, shape = large

    def logits(tasks, **others):
        evaluate = replace(config.evaluate, tasks=tasks, **others)
        asking = replace(config, stage=Stage.evaluate, evaluate=evaluate)
        (found,) = (
            part.bytes
            for _, parts in footprint.phases(asking, Shapes.of(model, shape), [], replace(tiny.FP32, micro_batch=512))
            for part in parts
            if part.what.startswith("logits of a task")
        )
        return found / (2 * 4 * shape.vocab_size)

    assert logits(["local"]) == 320 * 64
    assert logits(["local_cloze"], examples=5, fewshot=2) == 20 * 64 * 3
    assert logits(["local", "arc_easy"]) == logits(["local.yaml"]) == 512 * 256
