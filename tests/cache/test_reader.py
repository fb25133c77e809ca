"""Batches as they were written, in an order that a seed decides."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qat.artifacts import open_artifact
from qat.cache.reader import CacheReader
from qat.errors import ArtifactError

FIELDS = ("input_ids", "topk_ids", "topk_logprobs")


@pytest.fixture
def reader(cache):
    return CacheReader(cache, "train")


@pytest.fixture(scope="module")
def stored(cache):
    """All training tensors, joined from the files."""
    shards = [load_file(file) for file in sorted(cache.folder.glob("train-*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in FIELDS}


def rows_of(count):
    """A reader that only knows how many rows it has."""
    reader = CacheReader.__new__(CacheReader)
    reader.rows = count
    return reader


def test_batch_is_the_stored_rows_in_the_asked_order(reader, stored):
    rows = torch.tensor([reader.rows - 1, 0, 6, 4, 5, 6])  # across shards, one row twice
    batch = reader.batch(rows)
    for name in FIELDS:
        assert torch.equal(getattr(batch, name).double(), stored[name][rows].double())


def test_batch_is_ready_for_computing(reader):
    batch = reader.batch(torch.tensor([1, 2]))
    assert [getattr(batch, name).dtype for name in FIELDS] == [torch.int64, torch.int64, torch.float32]


def test_all_rows_in_order_are_the_files(reader, stored):
    parts = reader.in_order(4)
    assert [len(part) for part in parts[:-1]] == [4] * (len(parts) - 1)
    joined = torch.cat([reader.batch(part).input_ids for part in parts])
    assert torch.equal(joined, stored["input_ids"].long())


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_first_rows_are_at_most_those_there_are(reader, stored, count):
    assert torch.equal(reader.input_ids(count), stored["input_ids"][:count].long())


def test_micro_batches_are_the_batch(reader):
    batch = reader.batch(torch.arange(8))
    parts = batch.split(3)
    assert [len(part.input_ids) for part in parts] == [3, 3, 2]
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_training_takes_every_row_once_before_any_again(count, size, seed):
    reader = rows_of(count)
    steps = -(-3 * count // size)
    places = torch.cat([reader.training_rows(step, size, seed) for step in range(steps)]).tolist()
    for epoch in range(3):
        assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_any_step_can_be_asked_for_directly(count, size, seed, step):
    reader = rows_of(count)
    for before in range(step):
        reader.training_rows(before, size, seed)
    assert torch.equal(reader.training_rows(step, size, seed), rows_of(count).training_rows(step, size, seed))


def test_order_differs_by_seed_and_by_epoch():
    reader = rows_of(100)
    orders = [reader.training_rows(0, 100, seed) for seed in (0, 1, 4096, 2**32 - 1)]
    orders += [reader.training_rows(1, 100, 0), torch.arange(100)]
    assert all(not torch.equal(orders[i], orders[j]) for i in range(6) for j in range(i))


def test_order_does_not_depend_on_the_batch_size():
    reader = rows_of(13)
    small = torch.cat([reader.training_rows(step, 2, 5) for step in range(12)])
    assert torch.equal(small, torch.cat([reader.training_rows(step, 8, 5) for step in range(3)]))


def test_order_leaves_the_callers_randomness_alone():
    before = torch.random.get_rng_state()
    rows_of(10).training_rows(0, 4, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_format_version_is_refused(cache):
    older = dataclasses.replace(cache, manifest={**cache.manifest, "format": 0})
    with pytest.raises(ArtifactError, match=r"has cache format 0, this version reads 1: delete it"):
        CacheReader(older, "train")


def test_cut_shard_is_refused_before_it_is_read(obtain, tmp_path):
    folder = obtain(artifacts=tmp_path).folder
    shard = folder / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"train-00001\.safetensors has \d+ bytes instead of"):
        open_artifact(folder)
