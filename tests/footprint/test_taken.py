"""Whole small runs on a CPU: every phase takes what it was expected to take, within the bounds below."""

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest

from qat import checkpoints
from qat.cache.reader import CacheReader
from qat.config import LearnConfig, LossKind, ModeConfig, TrainConfig
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.quant.linear import quantized
from tests import launching, tiny

MB = 10**6
# What was taken may differ by a share of what was expected, and by what libraries and malloc take more or less of from
# one machine and run to the next
SHARE, APART = 0.2, 60 * MB
WIDE = ("+debug=tiny", "model.vocab_size=16000", "cache.length=128", "instance.micro_batch=32")
linux = pytest.mark.skipif(sys.platform != "linux", reason="begins the count anew by /proc")


def phases(outputs, *words):
    """What was expected and taken in each phase of a run, in bytes.

    It has an interpreter of its own, as one that is forked begins without the pages of libraries that it uses; and
    malloc as users have it, which other tests let keep what is free.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, launching.LAUNCH, *WIDE, *words, f"outputs={outputs}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=outputs, env=env)
    assert done.returncode == 0, done.stderr
    memory = json.loads((max(outputs.glob("SR-*")) / "result.json").read_text())["memory"]
    passed = {name: one for name, one in memory["phases"].items() if "peak_bytes" in one}
    return {name: (one["planned_bytes"], one["peak_bytes"]) for name, one in passed.items()}


def within(found):
    """The phases out of bounds."""
    return {name: pair for name, pair in found.items() if abs(pair[1] - pair[0]) > SHARE * pair[0] + APART}


@linux
def test_every_phase_takes_what_it_was_expected_to_take(tmp_path):
    found = phases(tmp_path, "train.batch_size=32", "train.steps=1", "quant.embed={bits: 4, rank: 4}")
    assert not within(found)
    making = {"text", "the cache", "comparison of passes", "conversion", "conversion of embed"}
    assert found.keys() == making | {"figures of the conversion", "training", "evaluation"}
    assert max(taken for _, taken in found.values()) > 200 * MB  # most of it no library's
    answering = ("stage=evaluate", "evaluate.answers=64", "evaluate.answer_tokens=8")
    for phase, words in (("evaluation", answering), ("export", ("stage=export", "export=hf", "export.output=made"))):
        found = phases(tmp_path, "checkpoint=SR-001", *words)
        assert phase in found and not within(found)


def test_what_learned_goes_when_training_is_over(teacher, cache, tmp_path):
    """Hooks of tensors are where Python's collector does not look."""
    folder = tiny.checkpoint_in(tmp_path / "checkpoint", teacher, cache)
    student, manifest = checkpoints.load(folder, teacher, tiny.FP32, latents=True)
    modules = quantized(student)
    named = {layer.name: (layer.role, modules[layer.name]) for layer in checkpoints.layers_of(manifest)}
    train = TrainConfig(steps=1, batch_size=8, learn=LearnConfig(latent=1.0))
    readers, mode = (CacheReader(cache, "train"), CacheReader(cache, "eval")), ModeConfig("e2e", True, True)
    trainer = Trainer(student, named, readers, train, mode, Loss(LossKind.bucket_kl), tiny.FP32, 0)
    trainer.run(lambda row: None, lambda: None)
    watched = [weakref.ref(one) for one in (student, trainer, trainer.learners._weights, *modules.values())]
    del student, modules, named, trainer
    gc.collect()
    assert not [one() for one in watched if one() is not None]
