"""Token ids in few bits, and what a position costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.cache.format import FORMAT_VERSION, bytes_a_row, decode_ids, encode_ids, high_bits, random_ids, shard_name

QWEN3 = 151_936


@given(st.integers(2, 2**24), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_ids_come_back_whatever_the_vocabulary(vocab_size, top_k, seed):
    ids = torch.randint(vocab_size, (2, 3, top_k), generator=torch.Generator().manual_seed(seed))
    ids[0, 0, 0] = vocab_size - 1
    stored = encode_ids(ids, vocab_size)
    assert stored["topk_ids"].dtype is torch.uint16
    assert ("topk_ids_high" in stored) is (vocab_size > 65_536)
    assert torch.equal(decode_ids(stored["topk_ids"], stored.get("topk_ids_high"), vocab_size), ids)


@pytest.mark.parametrize("vocab_size", [512, 70_000])
def test_no_ids_are_none(vocab_size):
    stored = encode_ids(torch.empty(3, 0, dtype=torch.long), vocab_size)
    assert decode_ids(stored["topk_ids"], stored.get("topk_ids_high"), vocab_size).shape == (3, 0)


@pytest.mark.parametrize(
    ("vocab_size", "bits"), [(49_152, 0), (65_536, 0), (65_537, 1), (131_072, 1), (QWEN3, 2), (262_208, 4), (2**24, 8)]
)
def test_high_bits_are_the_fewest_that_hold_the_vocabulary(vocab_size, bits):
    assert high_bits(vocab_size) == bits


def test_high_bits_of_an_id_are_where_the_format_says():
    stored = encode_ids(torch.tensor([[0x2_0001, 0x1_FFFF, 0x0_0000, 0x2_8000, 0x1_0000]]), QWEN3)
    assert stored["topk_ids"].int().tolist() == [[1, 0xFFFF, 0, 0x8000, 0]]
    assert stored["topk_ids_high"].tolist() == [[0b10_00_01_10, 0b01]]


@pytest.mark.parametrize(("random", "most"), [(128, 600), (0, 300)])
def test_a_position_of_the_largest_vocabulary_takes_few_bytes(random, most):
    meta = {"format": FORMAT_VERSION, "length": 64, "top_k": 64, "random": random, "vocab_size": QWEN3}
    assert bytes_a_row(meta, "train") / 63 <= most


def test_random_tokens_differ_by_seed_split_and_shard_and_cover_the_vocabulary():
    places = [(0, "train", 0), (1, "train", 0), (2**31, "train", 0), (0, "eval", 0), (0, "train", 1)]
    draws = [random_ids(*place, (8, 50, 16), 40) for place in places]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(5) for j in range(i))
    counts = draws[0].flatten().bincount(minlength=40).double()
    assert len(counts) == 40 and ((counts - 160) ** 2 / 160).sum() < 73  # 39 degrees of freedom, one in a thousand


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_random_tokens_take_every_seed_that_the_command_line_takes(seed):
    assert random_ids(seed, "eval", 3, (1, 2, 3), 10).shape == (1, 2, 3)


def test_shards_sort_by_number():
    names = [shard_name("train", number) for number in (0, 9, 10, 99_999)]
    assert names == sorted(names) and names[2] == "train-00010.safetensors"
