"""A cache says whose it is, or is compared with the teacher in hand."""

import dataclasses
import json

import pytest
import torch

from qat import models
from qat.cache.local import open_local
from qat.cache.older import import_older
from qat.cache.reader import CacheReader
from qat.config import CacheConfig, Config, DataConfig, LossConfig, LossKind, ModelConfig, ModelSource, Tail
from qat.errors import ArtifactError, ConfigError
from qat.fidelity import Sample, settle
from qat.forward import Found
from qat.machine import Machine
from qat.runs import Run
from qat.stages import cache as stage
from qat.stages.workspace import Workspace

CPU = Machine(torch.device("cpu"), torch.float32, 4)
BF16 = Machine(torch.device("cpu"), torch.bfloat16, 4)
ROWS, LENGTH, TOP_K = 24, 16, 5


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """Another model, whose 384 tokens all have a number that the tiny one knows too."""
    config = ModelConfig(name="smaller", source=ModelSource.tiny, vocab_size=384)
    return models.locate(config, tmp_path_factory.mktemp("smaller"))


@pytest.fixture
def recorded(tmp_path):
    """A folder as the older scripts leave it, of some model."""

    def make(teacher, **meta):
        model, draw = teacher.load(torch.float32, CPU.device), torch.Generator().manual_seed(3)
        ids = torch.randint(teacher.vocab_size(), (ROWS, LENGTH), generator=draw)
        top = model(ids).logits[:, :-1].topk(TOP_K)
        shard = {"input_ids": ids.int(), "topk_idx": top.indices.int(), "topk_logits": top.values.half()}
        folder = tmp_path / f"{teacher.name}_L16_K5_R0"
        folder.mkdir()
        torch.save(shard, folder / "shard_00000.pt")
        if meta:
            (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    return make


def compare(cache, teacher, machine):
    """As the stage does, by a job that has not looked yet."""
    settle(dataclasses.replace(teacher, found=Found()), machine, Sample.of_rows(CacheReader(cache, "eval")))


@pytest.mark.parametrize("machine", [CPU, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("meta", [{}, {"vocab_size": 512, "teacher_model": "x/tiny"}, {"vocab_size": 261}])
def test_the_teachers_own_cache_is_taken_whatever_it_is_called(recorded, tiny, machine, meta):
    compare(open_local(recorded(tiny, **meta), tiny, 0.3, Tail.exact), tiny, machine)


def test_the_cache_of_another_model_is_refused_although_its_tokens_are_known(recorded, smaller, tiny, tmp_path):
    found = open_local(recorded(smaller, teacher_model="x/smaller"), tiny, 0.3, Tail.exact)
    imported = open_local(import_older(found, tmp_path).folder, tiny, 0.3, Tail.exact)
    for cache in (found, imported):
        with pytest.raises(ArtifactError, match=r"does not hold what tiny .* says, .* recorded from another model"):
            compare(cache, tiny, CPU)


def test_a_vocabulary_of_another_size_is_refused_as_the_cache_states_it(recorded, smaller, tiny):
    with pytest.raises(ArtifactError, match="of a vocabulary of 384 tokens, tiny has 512: it was made with another"):
        open_local(recorded(smaller, vocab_size=384), tiny, 0.3, Tail.exact)


def test_rows_longer_than_the_teacher_was_made_for_are_refused(recorded, tiny, tmp_path):
    data, loss = DataConfig("", eval_fraction=0.3), LossConfig("", LossKind.topk_kl)
    config = Config(data=data, cache=CacheConfig("local"), loss=loss, outputs=str(tmp_path))
    short = Short(tiny.name, tiny.path, tiny.fingerprint)
    work = Workspace(config, Run(config, tmp_path), CPU, short, short)
    with pytest.raises(ConfigError, match="has rows of 16 tokens, tiny is made for at most 15"):
        stage._local(work, recorded(tiny))


class Short(models.ModelFolder):
    """A teacher that was made for rows of 15 tokens."""

    def context(self):
        return LENGTH - 1


def test_another_tokenizer_of_the_same_weights_is_refused(cache, tiny):
    folder = dataclasses.replace(tiny, text="in a folder, beside weights that do not tell of it")
    assert open_local(cache.folder, folder, 0.5, Tail.exact).key == cache.key

    class Other(models.ModelFolder):
        def tokenizer(self):
            found = super().tokenizer()
            found.add_tokens(["a token more"])
            return found

    with pytest.raises(ArtifactError, match="recorded with another tokenizer"):
        open_local(cache.folder, Other(tiny.name, tiny.path, tiny.fingerprint, "another"), 0.5, Tail.exact)
