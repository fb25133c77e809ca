"""What a cache holds, against the teacher's whole output distribution in float64."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qat.cache.format import random_ids, shard_name
from qat.cache.writer import outputs
from qat.data.documents import read_documents
from qat.errors import ConfigError, NumericsError

SEED, LENGTH, TOP_K, RANDOM, VOCABULARY, END = 9, 20, 6, 10, 512, 257
HALF = 2.0**-11  # relative rounding of float16


@pytest.fixture(scope="module")
def shards(cache):
    """Split, number and tensors of every shard."""
    files = sorted(cache.folder.glob("*.safetensors"))
    return [(file.stem[:-6], int(file.stem[-5:]), load_file(file)) for file in files]


@pytest.fixture(scope="module")
def exact(tiny):
    """Log-probabilities [N, L-1, V] in float64."""
    model = tiny.load(torch.float64, torch.device("cpu"))

    def compute(ids):
        with torch.inference_mode():
            return model(ids.long()).logits[:, :-1].log_softmax(-1)

    return compute


def test_shards_hold_the_documents_of_their_split_in_order(cache, shards, documents, small_shards):
    for split in ("train", "eval"):
        rows = [tensors["input_ids"] for name, _, tensors in shards if name == split]
        assert [len(part) for part in rows[:-1]] == [small_shards] * (len(rows) - 1) and len(rows) > 1
        stream = [token for document in read_documents(documents, split) for token in document.tokens]
        count = cache.manifest["sequences"][split]
        assert torch.cat(rows).flatten().tolist() == stream[: count * LENGTH]
        assert count == len(stream) // LENGTH


def test_training_and_evaluation_share_no_text(shards):
    seen = {"train": set(), "eval": set()}
    for split, _, tensors in shards:
        seen[split] |= set(tensors["input_ids"].flatten().tolist())
    assert seen["train"] & seen["eval"] == {END}


def test_top_tokens_and_log_probabilities_are_those_of_the_full_softmax(shards, exact):
    for _, _, tensors in shards:
        best, ids = exact(tensors["input_ids"]).topk(TOP_K)
        assert torch.equal(tensors["topk_ids"].long(), ids)
        stored = tensors["topk_logprobs"]
        assert stored.shape == (len(tensors["input_ids"]), LENGTH - 1, TOP_K)
        assert ((stored.double() - best).abs() <= HALF * best.abs() + 2e-5).all()


def test_types_are_those_of_the_format(shards):
    for _, _, tensors in shards:
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "input_ids": torch.int32,
            "topk_ids": torch.int32,
            "topk_logprobs": torch.float16,
            "random_logprobs": torch.float16,
        }


def test_tail_is_the_mass_outside_the_top_tokens(shards, exact):
    for _, _, tensors in shards:
        probabilities = exact(tensors["input_ids"]).exp()
        tail = probabilities.scatter(-1, tensors["topk_ids"].long(), 0).sum(-1)
        stored = 1 - tensors["topk_logprobs"].double().exp().sum(-1)
        assert tail.max() > 0.1
        assert ((stored - tail).abs() < 2e-3).all()


def test_random_tokens_drawn_again_have_the_stored_log_probabilities(shards, exact):
    for split, number, tensors in shards:
        stored = tensors["random_logprobs"]
        ids = random_ids(SEED, split, number, tuple(stored.shape), VOCABULARY)
        wanted = exact(tensors["input_ids"]).gather(-1, ids)
        assert stored.shape[-1] == RANDOM
        assert ((stored.double() - wanted).abs() <= HALF * wanted.abs() + 2e-5).all()


def test_random_sample_estimates_the_whole_mass(shards):
    drawn = torch.cat([tensors["random_logprobs"].flatten() for _, _, tensors in shards]).double()
    mass = drawn.exp() * VOCABULARY
    assert abs(mass.mean() - 1) < 5 * mass.std() / len(mass) ** 0.5


def test_random_tokens_differ_by_seed_split_and_shard_and_cover_the_vocabulary():
    places = [(0, "train", 0), (1, "train", 0), (2**31, "train", 0), (0, "eval", 0), (0, "train", 1)]
    draws = [random_ids(*place, (8, 50, 16), 40) for place in places]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(5) for j in range(i))
    counts = draws[0].flatten().bincount(minlength=40).double()
    assert len(counts) == 40 and ((counts - 160) ** 2 / 160).sum() < 73  # 39 degrees of freedom, one in a thousand


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_random_tokens_take_every_seed_that_the_command_line_takes(seed):
    assert random_ids(seed, "eval", 3, (1, 2, 3), 10).shape == (1, 2, 3)


def test_description_is_in_the_folder_and_in_the_manifest(cache, documents, tiny):
    meta = json.loads((cache.folder / "meta.json").read_text())
    assert meta.items() <= cache.manifest.items()
    assert meta["teacher"] == {"name": "tiny", "fingerprint": tiny.fingerprint}
    assert (meta["documents"], meta["vocab_size"], meta["format"]) == (documents.key, VOCABULARY, 1)
    assert cache.folder.name == f"text_L20_K6_R10-{cache.key}"


def test_limit_is_on_training_sequences_alone(obtain, cache):
    limited = obtain(sequences=7).manifest["sequences"]
    assert limited == {"train": 7, "eval": cache.manifest["sequences"]["eval"]}


@pytest.mark.parametrize("changed", [{"length": 19}, {"top_k": 5}, {"random": 9}, {"sequences": 7}, {"seed": 8}])
def test_what_shapes_the_content_changes_the_key(obtain, cache, changed):
    assert obtain(**changed).key != cache.key


def test_other_documents_change_the_key(obtain, cache, other_documents):
    assert obtain(other_documents).key != cache.key


def test_machine_changes_neither_key_nor_content(obtain, cache, cpu, tmp_path):
    single = dataclasses.replace(cpu, micro_batch=1)
    assert obtain(machine=single).folder == cache.folder
    again = obtain(machine=single, artifacts=tmp_path)
    assert again.key == cache.key
    for file in cache.folder.glob("*.safetensors"):
        one, other = load_file(file), load_file(again.folder / file.name)
        assert torch.equal(one["topk_ids"], other["topk_ids"])
        torch.testing.assert_close(one["topk_logprobs"], other["topk_logprobs"], rtol=2 * HALF, atol=1e-5)


def test_option_name_of_the_cache_changes_nothing(obtain, cache):
    assert obtain(name="local").folder == cache.folder


def test_too_little_text_is_refused_and_leaves_nothing(obtain, tmp_path):
    with pytest.raises(ConfigError, match=r"the eval split has less text .* cache\.length=600"):
        obtain(length=600, artifacts=tmp_path)
    assert [path for path in (tmp_path / "caches").iterdir() if path.suffix != ".lock"] == []


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_kept_outputs_are_exact_for_any_logits(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(2, 3, 40, generator=generator)).to(dtype)
    sample = torch.randint(40, (2, 3, 7), generator=generator)
    kept = outputs(logits, sample, 5)
    wanted = logits.double().log_softmax(-1)
    assert torch.equal(logits.gather(-1, kept["topk_ids"].long()), logits.sort(-1, descending=True).values[..., :5])
    for name, ids in (("topk_logprobs", kept["topk_ids"].long()), ("random_logprobs", sample)):
        exact = wanted.gather(-1, ids)
        assert ((kept[name].double() - exact).abs() <= HALF * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(1, 2, 8)
    logits[0, 1, 3] = value
    with pytest.raises(NumericsError, match="NaN or infinity"):
        outputs(logits, torch.zeros(1, 2, 4, dtype=torch.long), 2)


def test_shards_sort_by_number():
    names = [shard_name("train", number) for number in (0, 9, 10, 99_999)]
    assert names == sorted(names) and names[2] == "train-00010.safetensors"
