"""Batches as they were written, in an order that a seed decides, out of files that are what they should be."""

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qat.artifacts import open_artifact
from qat.cache.format import decode_ids
from qat.cache.order import training_rows
from qat.cache.reader import CacheReader
from qat.config import Packing
from qat.errors import ArtifactError

CPU = torch.device("cpu")


@pytest.fixture
def reader(cache):
    return CacheReader(cache, "train")


@pytest.fixture(scope="module")
def stored(cache):
    """All training tensors, joined from the files."""
    parts = [load_file(file) for file in sorted(cache.folder.glob("train-*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def expected(stored, rows):
    return {
        "input_ids": stored["input_ids"][rows].long(),
        "topk_ids": decode_ids(stored["topk_ids"][rows], None, 512),
        "topk_logprobs": stored["topk_logprobs"][rows].float(),
        "loss_mask": stored["loss_mask"][rows].bool(),
    }


def check(batch, wanted):
    for name, tensor in wanted.items():
        found = getattr(batch, name)
        assert found.dtype is tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("rows", [[87 - 60, 0, 6, 4, 5, 6], [3], [4, 5, 6, 7, 8, 9, 10, 11], [2, 1, 0]])
def test_batch_is_the_stored_rows_in_the_asked_order(reader, stored, rows):
    rows = torch.tensor(rows)  # across shards, one row twice
    check(reader.batch(rows), expected(stored, rows))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_any_rows_can_be_asked_for(cache, stored, rows):
    rows = torch.tensor(rows)
    check(CacheReader(cache, "train").batch(rows), expected(stored, rows))


def test_all_rows_in_order_are_the_files(reader, stored):
    parts = reader.in_order(4)
    assert [len(part) for part in parts[:-1]] == [4] * (len(parts) - 1)
    joined = torch.cat([reader.batch(part).input_ids for part in parts])
    assert torch.equal(joined, stored["input_ids"].long())


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_first_rows_are_at_most_those_there_are(reader, stored, count):
    assert torch.equal(reader.input_ids(count), stored["input_ids"][:count].long())


def test_micro_batches_are_the_batch(reader, stored):
    parts = reader.batch(torch.arange(8)).split(3)
    assert [len(part.input_ids) for part in parts] == [3, 3, 2]
    for part, rows in zip(parts, torch.arange(8).split(3), strict=True):
        check(part, expected(stored, rows))
        check(part.to(CPU), expected(stored, rows))


def test_a_batch_gives_the_model_documents_that_do_not_see_each_other(reader, tiny):
    model = tiny.load(torch.float32, CPU)
    batch = reader.batch(torch.arange(reader.rows))
    assert (batch.stored["document_starts"].sum(1) > 1).any()
    logprobs = model(**batch.inputs()).logits[:, :-1].log_softmax(-1).gather(-1, batch.topk_ids)
    assert torch.allclose(logprobs, batch.topk_logprobs, rtol=1e-3, atol=1e-4)


def test_padded_rows_need_token_ids_alone(obtain):
    batch = CacheReader(obtain(packing=Packing.rows), "train").batch(torch.arange(3))
    assert set(batch.inputs()) == {"input_ids"}


def test_stream_is_the_batches_in_order_and_ends(reader, stored):
    order = [reader.training_rows(step, 6, 3) for step in range(9)]
    found = list(reader.stream(iter(order), CPU))
    assert len(found) == 9
    for batch, rows in zip(found, order, strict=True):
        check(batch, expected(stored, rows))


def test_stream_reads_ahead_but_not_far(reader):
    asked = []

    def order():
        for step in range(100):
            asked.append(step)
            yield reader.training_rows(step, 2, 0)

    stream = reader.stream(order(), CPU)
    next(stream)
    assert len(asked) == 5
    stream.close()


def test_stream_hands_on_what_goes_wrong(reader):
    with pytest.raises(IndexError):
        list(reader.stream([torch.tensor([10**6])], CPU))


def test_a_file_cut_short_behind_the_readers_back_is_named(copy):
    reader = CacheReader(open_artifact(copy), "train")
    with open(copy / "train-00001.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ArtifactError, match=r"train-00001\.safetensors was cut short while it was read"):
        reader.batch(torch.arange(10))


def test_more_shards_than_open_files_are_allowed(cache, stored):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        check(CacheReader(cache, "train").batch(torch.arange(9)), expected(stored, torch.arange(9)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_resident_memory_stays_flat(tmp_path):
    """A process that reads 600 MB, twice over, grows by less than a tenth of it."""
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from qat.cache import shards
from qat.cache.format import layout
folder, rows = Path(sys.argv[1]), 512
meta = dict(key="k", length=65, top_k=64, random=256, vocab_size=512, shard_rows=rows, sequences={"train": 25 * rows})
types = {"U8": torch.uint8, "U16": torch.uint16, "F16": torch.float16, "I32": torch.int32}
tensors = {n: torch.zeros([rows, *shape], dtype=types[kind]) for n, (kind, shape) in layout(meta, "train").items()}
for index in range(25):
    name = f"train-{index:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"shard": f"k/{name}"})
del tensors
source = shards.Shards(folder, meta, "train")
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
source.read(torch.arange(64))
before = most = resident()
for part in torch.randperm(25 * rows).split(64) + torch.arange(25 * rows).split(64):
    source.read(part)
    most = max(most, resident())
print(most - before, sum(p.stat().st_size for p in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    shutil.rmtree(tmp_path)
    assert size > 600e6 and grown < 60e6


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_training_takes_every_row_once_before_any_again(count, size, seed):
    steps = -(-3 * count // size)
    places = torch.cat([training_rows(count, step, size, seed) for step in range(steps)]).tolist()
    for epoch in range(3):
        assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_any_step_can_be_asked_for_directly(count, size, seed, step):
    fresh = training_rows(count, step, size, seed)
    for before in range(step):
        training_rows(count, before, size, seed)
    assert torch.equal(training_rows(count, step, size, seed), fresh)


def test_order_differs_by_seed_and_by_epoch():
    orders = [training_rows(100, 0, 100, seed) for seed in (0, 1, 4096, 2**32 - 1)]
    orders += [training_rows(100, 1, 100, 0), torch.arange(100)]
    assert all(not torch.equal(orders[i], orders[j]) for i in range(6) for j in range(i))


def test_order_does_not_depend_on_the_batch_size():
    small = torch.cat([training_rows(13, step, 2, 5) for step in range(12)])
    assert torch.equal(small, torch.cat([training_rows(13, step, 8, 5) for step in range(3)]))


def test_order_leaves_the_callers_randomness_alone():
    before = torch.random.get_rng_state()
    training_rows(10, 0, 4, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_format_version_is_refused(cache):
    older = dataclasses.replace(cache, manifest={**cache.manifest, "format": 1})
    with pytest.raises(ArtifactError, match=r"has cache format 1, this version reads 2 and 3: delete it"):
        CacheReader(older, "train")


@pytest.fixture
def copy(cache, tmp_path):
    """The cache in a folder that may be damaged."""
    return shutil.copytree(cache.folder, tmp_path / "copy")


def refused(folder, said):
    """Refused on opening, and by the reader alone too."""
    with pytest.raises(ArtifactError):
        open_artifact(folder)
    from qat.artifacts import Artifact, read_manifest

    with pytest.raises(ArtifactError, match=said):
        CacheReader(Artifact(folder, read_manifest(folder)), "train")


def test_cut_shard_is_named(copy):
    shard = copy / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(copy, r"train-00001\.safetensors is damaged or no file of safetensors .*delete")


def test_missing_shard_is_named(copy):
    (copy / "train-00002.safetensors").unlink()
    refused(copy, r"train-00002\.safetensors is missing: delete")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\xff" * 100, b"\x04" + bytes(7) + b"null", b"\x10" + bytes(7) + b'{"__metadata__":1' + b"}"],
)
def test_no_shard_at_all_is_named(copy, content):
    (copy / "train-00000.safetensors").write_bytes(content)
    refused(copy, r"train-00000\.safetensors is damaged or no file of safetensors")


def test_shard_in_anothers_place_is_named(copy):
    shutil.copy(copy / "train-00001.safetensors", copy / "train-00000.safetensors")
    refused(copy, r"train-00000\.safetensors is the shard \w+/train-00001\.safetensors of another")


def test_shard_of_another_cache_is_named(copy, obtain):
    other = obtain(seed=8)
    shutil.copy(other.folder / "train-00000.safetensors", copy)
    refused(copy, rf"is the shard {other.key}/train-00000")


def test_shard_of_another_layout_is_named(copy, cache):
    path = copy / "train-00000.safetensors"
    tensors = load_file(path)
    tensors["topk_ids"] = tensors["topk_ids"].int()
    save_file(tensors, path, metadata={"shard": f"{cache.key}/{path.name}"})
    refused(copy, r"train-00000\.safetensors does not hold what")


def test_altered_byte_is_named_on_opening(copy):
    path = copy / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=re.escape(f"{path} was altered")):
        open_artifact(copy)


def test_headers_alone_are_valid_json(copy):
    assert json.loads((copy / "meta.json").read_text())["packing"] == "joined"
