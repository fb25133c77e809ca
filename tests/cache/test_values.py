"""A cache whose files are whole and whose numbers are not: each is named when it is opened, and looked at once."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.artifacts import MANIFEST, hashed
from qat.cache import values
from qat.cache.local import open_local
from qat.cache.older import open_older
from qat.cache.reader import CacheReader
from qat.cache.values import checked
from qat.config import Tail
from qat.errors import ArtifactError

SHARD = "train-00001.safetensors"  # of five rows


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache.folder, tmp_path / "copy")


def change(folder, edit, *shards):
    """Writes shards again after an edit, and enters them into the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in shards or (SHARD,):
        path = folder / shard
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata=said)
        manifest["files"][shard] = {"bytes": path.stat().st_size, "sha256": hashed([path])[0]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def put(name, value, place=(3, 2)):
    return lambda tensors: tensors[name].__setitem__(place, value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put("topk_logprobs", torch.nan, (3, 7, 2)), "NaN or infinity is among the log-probabilities in row 3 of"),
        (put("topk_logprobs", -torch.inf, (0, 0, 5)), "NaN or infinity is among the log-probabilities in row 0 of"),
        (put("topk_logprobs", 0.5, (4, 0, 0)), "a probability above 1 is in row 4 of"),
        (put("topk_ids", 512, (3, 7, 2)), "a kept token that the vocabulary lacks is in row 3 of"),
        (put("input_ids", 512), "a token that the vocabulary lacks is in row 3 of"),
        (put("input_ids", -1), "a token that the vocabulary lacks is in row 3 of"),
        (put("loss_mask", 2), "the mask of what counts holds something else than 0 and 1 in row 3 of"),
        (put("document_starts", 255), "the mask of where documents begin holds something else than 0 and 1 in row 3"),
    ],
)
def test_a_number_that_no_teacher_says_is_named_with_its_place(copy, tiny, edit, said):
    change(copy, edit)
    with pytest.raises(ArtifactError, match=f"{said}.*{SHARD}; record the cache again"):
        open_local(copy, tiny, 0.25, Tail.exact)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_mask_that_leaves_nothing_is_named(copy, tiny, split):
    shards = sorted(path.name for path in copy.glob(f"{split}-*"))
    change(copy, lambda tensors: tensors["loss_mask"].zero_(), *shards)
    with pytest.raises(ArtifactError, match=f"no position of the {split} split counts"):
        open_local(copy, tiny, 0.25, Tail.exact)


def test_a_cache_is_looked_at_once_as_long_as_it_stays_the_same(copy, tiny, monkeypatch):
    looked, real = [], values._look
    monkeypatch.setattr(values, "_look", lambda cache, split: (looked.append(split), real(cache, split)))
    for _ in range(3):
        open_local(copy, tiny, 0.25, Tail.exact)
    assert looked == ["train", "eval"]
    change(copy, put("topk_logprobs", torch.nan, (0, 0, 0)))
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        open_local(copy, tiny, 0.25, Tail.exact)


def test_a_shard_that_nobody_listed_and_one_too_few_are_refused(copy, tiny):
    manifest = json.loads((copy / MANIFEST).read_text())
    shard = manifest["files"].pop("eval-00000.safetensors")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"it lists \d+ files, and its rows are in \d+ shards"):
        open_local(copy, tiny, 0.25, Tail.exact)
    manifest["files"]["eval-00000.safetensors"] = shard
    manifest["top_k"] = 5
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"its manifest says something else of top_k than meta\.json"):
        open_local(copy, tiny, 0.25, Tail.exact)


@pytest.mark.parametrize("name", ["topk_logits", "rand_logits"])
def test_numbers_of_older_shards_that_are_none(tmp_path, name):
    draw = torch.Generator().manual_seed(0)
    for number in range(2):
        ids = torch.randint(512, (6, 8), generator=draw).int()
        kept = torch.randint(512, (6, 7, 4), generator=draw).int()
        shard = {"input_ids": ids, "topk_idx": kept, "topk_logits": torch.randn(kept.shape, generator=draw).half()}
        shard |= {"rand_idx": 511 - kept, "rand_logits": torch.randn(kept.shape, generator=draw).half()}
        if number:
            shard[name][2, 3, 1] = torch.nan
        torch.save(shard, tmp_path / f"shard_{number:05d}.pt")
    with pytest.raises(ArtifactError, match=r"row 2 of shard_00001\.pt"):
        cache = checked(open_older(tmp_path, 512, 0.4, Tail.estimate))
        for split in ("train", "eval"):
            reader = CacheReader(cache, split)
            reader.batch(torch.arange(reader.rows))
