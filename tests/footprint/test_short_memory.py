"""What does not fit names the cheapest key, `instance=auto` turns it by itself, and the screen says it in one line."""

import logging
import re
from dataclasses import replace

import psutil
import pytest
import torch
import transformers

from qat import capacity, footprint
from qat.cli import arguments, main
from qat.config import Stage
from qat.console import LINE
from qat.errors import ConfigError
from qat.footprint import Job, Shapes
from qat.footprint.libraries import BESIDE
from qat.footprint.places import LEAD
from qat.footprint.preparation import written
from qat.generation import Sampling, rows
from qat.quant.architectures import select
from qat.stages import limits
from tests import tiny

GB = 10**9
H200 = replace(tiny.FP32, device=torch.device("cuda"), dtype=torch.bfloat16, compile=True, micro_batch=16)


@pytest.fixture(scope="module")
def shape():
    """Qwen3-0.6B's."""
    return transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def model(shape):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shape)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free, of host memory and of a GPU."""

    def sets(host, gpu=None):
        monkeypatch.setattr(capacity, "host", lambda: (int(host), 10**12))
        monkeypatch.setattr(capacity, "device", lambda device: gpu if device.type == "cuda" else None)
        monkeypatch.setattr(capacity, "whole", lambda device: 150 * GB if device.type == "cuda" else None)
        monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))

    return sets


def configured(*words, stage=Stage.distill):
    typed = ["model=tiny", "cache.random=8", *words, "cache.top_k=64", "mode=e2e"]
    return replace(main.check(arguments.parse(typed)).configs[0], stage=stage)


def jobs_of(model):
    return lambda changed: [Job(select(model, changed.quant), changed.mode, changed.train)]


LATENT = ("train.learn.latent=1", "loss=full_kl", "train.batch_size=64")


@pytest.mark.parametrize(
    ("short", "keys"),
    [
        (0.0, []),
        (0.1, ["instance.micro_batch=8"]),
        (2.5, ["instance.micro_batch=4"]),
        (5.5, ["instance.micro_batch=1", "instance.moments=host"]),
    ],
)
def test_a_gpu_that_is_short_of_memory_gets_settings_that_change_no_result(model, shape, free, short, keys):
    config, shapes, jobs = configured(*LATENT), Shapes.of(model, shape), jobs_of(model)
    free(300 * GB, 140 * GB)
    whole = max(footprint.expected(config, shapes, jobs(config), H200).values())
    free(300 * GB, int(whole + BESIDE - short * GB) + 1)
    changed, machine, turned = footprint.adjusted(config, shapes, jobs, H200)
    assert turned == keys
    fits = max(footprint.expected(changed, shapes, jobs(changed), machine).values())
    assert fits <= whole - short * GB + 1
    said = f"instance.micro_batch={machine.micro_batch}"
    assert (said in keys) == (machine.micro_batch != 16) and machine.host_moments == ("instance.moments=host" in keys)
    if keys:
        assert footprint.remedy(config, shapes, jobs, H200, None) == keys


def test_what_would_change_a_result_is_named_and_never_turned(model, shape, free):
    config, shapes, jobs = configured(*LATENT), Shapes.of(model, shape), jobs_of(model)
    free(300 * GB, 4 * GB)
    changed, machine, turned = footprint.adjusted(config, shapes, jobs, H200)
    assert (turned, machine, changed) == ([], H200, config)
    with pytest.raises(ConfigError, match=r"train\.learn\.latent=0.* makes it fit"):
        footprint.check(config, shapes, jobs, H200)


def test_instance_auto_turns_it_before_a_run_and_says_so(teacher, free, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    config = configured("train.batch_size=4096", "instance.micro_batch=4096", "cache.length=256", stage=Stage.run)
    machine = replace(tiny.FP32, micro_batch=4096)
    needed = footprint.expected(config, *known(config, teacher, machine))
    free(max(needed.values()) / 3)
    turned, expected = limits.check(config, teacher, teacher, machine)
    assert turned.micro_batch < 4096 and max(expected.values()) <= max(needed.values()) / 3
    assert f"memory is short: instance.micro_batch={turned.micro_batch} from here on" in caplog.text
    named = replace(config, instance=replace(config.instance, name="cpu"))
    with pytest.raises(ConfigError, match=r"instance\.micro_batch=\d+ makes it fit"):  # what must be there alone
        limits.check(named, teacher, teacher, machine)
    for asked, said in ((config, "instance=auto turns"), (named, "makes it fit")):
        place = limits.planned(asked, teacher, teacher, machine)["training"]
        assert said in limits.advice(asked, teacher, teacher, machine, "training", place)


def known(config, teacher, machine):
    return limits.shapes_of(teacher, teacher, machine), jobs_of(teacher.skeleton())(config), machine


@pytest.mark.parametrize("gpu", [None, 140 * GB])
@pytest.mark.parametrize("stage", [Stage.run, Stage.cache, Stage.convert, Stage.distill, Stage.evaluate])
def test_the_line_of_a_log_has_no_more_columns_than_a_screen(model, shape, free, gpu, stage):
    config = configured(*LATENT, stage=stage)
    free(22 * GB, gpu)
    machine = H200 if gpu else tiny.FP32
    plan = footprint.plan(config, Shapes.of(model, shape), jobs_of(model)(config), machine)
    said = f"{LEAD}{footprint.summary(plan)}"
    assert len(said) <= LINE and " free" in said


def test_text_is_planned_with_the_rows_that_it_is_written_with(model, shape, free):
    """By hand: of a GPU of 150 GB a quarter, in rows of keys, values, four texts and copies of logits."""
    free(300 * GB, 140 * GB)
    config = configured("data=tokens", "data.documents=20000", "data.answer_tokens=126", stage=Stage.cache)
    shapes = Shapes.of(model, shape)
    a_token = 2 * 28 * 8 * 128 * 2
    most = int(37.5 * GB / (128 * a_token + 4 * 4 * 151_936))
    planned = written(config.data, shapes, H200)
    assert planned.rows == -(-20_000 // -(-20_000 // most))
    assert planned == rows.batches(shape, H200, 20_000, 2, Sampling(126, 4, 1.0, (0,)))
    text, _ = [parts for name, parts in footprint.phases(config, shapes, [], H200) if name == "text"]
    held = sum(part.bytes for part in text if "rows more" in part.what or "of a row" in part.what)
    assert held == planned.rows * (128 * a_token + 4 * 126 * (4 + 4) + 2 * 4 * 151_936)
    assert sum(part.bytes for part in text if part.least) < 2 * shapes.weights + 0.2 * GB


STAGES = [
    (Stage.cache, ("data.answer_tokens=80",), "text", 0.9, r"data\.answer_tokens=40 makes it fit"),
    (Stage.cache, ("data=prompts",), "text", 0.6, r"data\.documents=\d+ makes it fit"),
    (Stage.convert, ("convert=thorough", "data=text", "data.path=README.md"), "conversion", 0.9, r"passes=1 makes it"),
    (Stage.distill, LATENT, "training", 0.9, r"instance\.micro_batch=\d+ makes it fit"),
    (Stage.run, (), "training", 0.9, r"instance\.micro_batch=\d+ makes it fit"),
    (Stage.evaluate, (), "evaluation", 0.6, "choose a smaller model"),
    (Stage.evaluate, ("evaluate.answers=200", "evaluate.answer_tokens=512"), "evaluation", 0.9, r"answer_tokens=256 m"),
    (Stage.chat, ("chat.max_tokens=4096",), "answers", 0.9, r"chat\.max_tokens=2048 makes it fit"),
    (Stage.export, ("export=hf", "export.dtype=fp32", "export.output=made"), "export", 0.9, r"export\.dtype=bf16 m"),
]


@pytest.mark.parametrize(("stage", "words", "phase", "share", "said"), STAGES)
def test_every_stage_says_what_makes_it_fit(model, shape, free, caplog, stage, words, phase, share, said):
    """A CPU on which a share of what a stage is expected to take is free: it is warned, or refused."""
    mode = () if stage in (Stage.evaluate, Stage.chat, Stage.export) else ("mode=e2e",)
    asked = (f"stage={stage.name}",) if not mode else ()
    config = main.check(arguments.parse(["model=tiny", "cache.top_k=64", *mode, *asked, *words])).configs[0]
    config, machine = replace(config, stage=stage), replace(tiny.FP32, micro_batch=16)
    shapes, jobs = Shapes.of(model, shape, streams=False), jobs_of(model)
    free(10**12)
    free(share * max(footprint.expected(config, shapes, jobs(config), machine).values()))
    try:
        footprint.check(config, shapes, jobs, machine)
    except ConfigError as error:
        caplog.records.clear()
        told = str(error)
    else:
        told = caplog.text
    assert f"{phase} " in told and re.search(said, told), told
