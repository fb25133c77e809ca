"""Caches of the older scripts: read where they lie, exactly; what they lack is refused or estimated by name."""

import dataclasses
import hashlib
import json

import pytest
import torch

from qat.artifacts import open_artifact
from qat.cache.local import open_local
from qat.cache.older import estimated, import_older, open_older
from qat.cache.reader import CacheReader
from qat.config import Tail
from qat.errors import ArtifactError, ConfigError

LENGTH, TOP_K, RANDOM, VOCABULARY = 12, 5, 40, 512
SHARDS = (4, 3, 1, 6)


@pytest.fixture(scope="module")
def recorded(tiny):
    """Rows, and everything that the older scripts write of the tiny model's outputs on them."""
    model = tiny.load(torch.float32, torch.device("cpu"))
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (sum(SHARDS), LENGTH), generator=draw)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    top, best = logits.topk(TOP_K)
    sample = torch.randint(VOCABULARY, (*best.shape[:2], RANDOM), generator=draw)
    return {
        "input_ids": ids.int(),
        "attention_mask": torch.ones_like(ids, dtype=torch.uint8),
        "topk_idx": best.int(),
        "topk_logits": top.half(),
        "rand_idx": sample.int(),
        "rand_logits": logits.gather(-1, sample).half(),
    }


@pytest.fixture
def older(recorded, tmp_path):
    """A folder of shards, the third of one row without the leading dimension."""

    def make(name="alpaca_L12_K5_R40", drop=(), meta=True, **changed):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {key: value for key, value in (recorded | changed).items() if key not in drop}
        parts = {key: value.split(SHARDS) for key, value in tensors.items()}
        for index, rows in enumerate(SHARDS):
            shard = {key: part[index].clone() for key, part in parts.items()}
            if rows == 1:
                shard = {key: tensor[0] for key, tensor in shard.items()}
            torch.save(shard, folder / f"shard_{index:05d}.pt")
        if meta:
            described = {"format": "qwen_kd_topk_cache_v1", "teacher_model": "tiny", "topk": TOP_K}
            (folder / "meta.json").write_text(json.dumps(described))
            (folder / "progress.json").write_text("{}")
        return folder

    return make


def rows_of(folder, split, tail=Tail.exact):
    reader = CacheReader(open_older(folder, VOCABULARY, 0.3, tail), split)
    return reader, reader.batch(torch.arange(reader.rows))


def split_of(row):
    digest = hashlib.sha256(row.numpy().astype("<i4").tobytes()).digest()
    return "eval" if int.from_bytes(digest[:8]) < 0.3 * 2**64 else "train"


@pytest.mark.parametrize("drop", [(), ("attention_mask",), ("rand_idx", "rand_logits")])
def test_rows_are_read_exactly_and_split_by_a_hash(older, recorded, drop):
    folder = older(drop=drop, meta=not drop)
    for split in ("train", "eval"):
        reader, batch = rows_of(folder, split)
        mine = [i for i, row in enumerate(recorded["input_ids"]) if split_of(row) == split]
        assert 0 < len(mine) == reader.rows == reader.meta["sequences"][split]
        assert torch.equal(batch.input_ids, recorded["input_ids"][mine].long())
        assert torch.equal(batch.topk_ids, recorded["topk_idx"][mine].long())
        assert torch.equal(batch.topk_logprobs, recorded["topk_logits"][mine].float())
        assert batch.loss_mask.all() and set(batch.inputs()) == {"input_ids"}
        assert torch.equal(reader.batch(torch.tensor([1, 0])).input_ids, batch.input_ids[[1, 0]])
    assert (reader.meta["length"], reader.meta["top_k"], reader.meta["tail"]) == (LENGTH, TOP_K, "missing")


def test_wider_types_are_read_too(older, recorded):
    wide = {"input_ids": recorded["input_ids"].long(), "topk_idx": recorded["topk_idx"].long()}
    plain, _ = rows_of(older(), "train"), None
    other = rows_of(older("wide", topk_logits=recorded["topk_logits"].float(), **wide), "train")
    assert torch.equal(plain[1].topk_ids, other[1].topk_ids) and torch.equal(plain[1].input_ids, other[1].input_ids)


def test_padding_does_not_count(older, recorded):
    mask = recorded["attention_mask"].clone()
    mask[:, 9:] = 0
    _, batch = rows_of(older(attention_mask=mask), "train")
    assert batch.loss_mask.tolist() == [[True] * 8 + [False] * 3] * len(batch.loss_mask)


def test_padding_in_front_is_refused(older, recorded):
    mask = recorded["attention_mask"].clone()
    mask[0, 0] = 0
    with pytest.raises(ArtifactError, match=r"shard_00000\.pt has rows that are padded in front"):
        rows_of(older(attention_mask=mask), "train")


def test_rows_that_come_twice_are_taken_once(older, recorded):
    twice = {key: torch.cat([value[:9], value[4:9]]) for key, value in recorded.items()}
    folder = older(**twice)
    assert sum(rows_of(folder, split)[0].rows for split in ("train", "eval")) == 9


def test_estimate_of_the_tail_is_unbiased(recorded, tiny):
    model = tiny.load(torch.float64, torch.device("cpu"))
    with torch.no_grad():
        logits = model(recorded["input_ids"].long()).logits[:, :-1]
    exact = logits.logsumexp(-1)
    draw = torch.Generator().manual_seed(0)
    top, ids = logits.topk(TOP_K)
    sample = torch.randint(VOCABULARY, (*ids.shape[:2], 20_000), generator=draw)
    found = estimated(ids, top, sample, logits.gather(-1, sample), VOCABULARY)
    assert ((top[..., 0] - found[..., 0]) - exact).abs().max() < 0.05
    alone = estimated(ids, top, ids, top, VOCABULARY)  # a sample that lies inside adds nothing
    assert torch.allclose(alone.double().exp().sum(-1), torch.ones(ids.shape[:2], dtype=torch.float64), atol=1e-5)


def test_estimate_makes_log_probabilities(older):
    _, raw = rows_of(older(), "train")
    reader, batch = rows_of(older("again"), "train", Tail.estimate)
    assert reader.meta["tail"] == "estimated"
    mass = batch.topk_logprobs.exp().sum(-1)
    assert (mass < 1).any() and (mass < 1 + 1e-5).all()
    steps = batch.topk_logprobs - batch.topk_logprobs[..., :1]
    assert torch.allclose(steps, raw.topk_logprobs - raw.topk_logprobs[..., :1], atol=1e-4)


def test_estimate_without_a_sample_is_refused(older):
    with pytest.raises(ConfigError, match=r"cache.tail=estimate needs a random sample"):
        open_older(older(drop=("rand_idx", "rand_logits")), VOCABULARY, 0.3, Tail.estimate)


@pytest.mark.parametrize("tail", Tail)
def test_import_says_the_same_in_our_format(older, tmp_path, tail, tiny):
    source = open_older(older(), VOCABULARY, 0.3, tail)
    made = import_older(source, tmp_path / "artifacts")
    assert made.folder.name == f"alpaca_L12_K5_R0-{made.key}"
    assert made.manifest["tail"] == ("estimated" if tail is Tail.estimate else "missing")
    again = open_local(made.folder, tiny, 0.3, Tail.exact)
    for split in ("train", "eval"):
        old, new = CacheReader(source, split), CacheReader(again, split)
        rows = torch.arange(old.rows)
        assert new.rows == old.rows
        one, other = old.batch(rows), new.batch(rows)
        for name in ("input_ids", "topk_ids", "loss_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.topk_logprobs.half(), other.topk_logprobs.half())
    assert import_older(source, tmp_path / "artifacts").key == made.key


def test_split_and_estimate_are_part_of_the_key(older):
    folder = older()
    keys = {
        open_older(folder, VOCABULARY, fraction, tail).key
        for fraction, tail in [(0.3, Tail.exact), (0.3, Tail.exact), (0.4, Tail.exact), (0.3, Tail.estimate)]
    }
    assert len(keys) == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"weight": torch.zeros(3)}, path)


def no_dict(path):
    torch.save(torch.zeros(3), path)


def shorter(path):
    shard = torch.load(path, weights_only=True)
    torch.save(shard | {"topk_idx": shard["topk_idx"][:, :-1].clone()}, path)


def fewer(path):
    shard = torch.load(path, weights_only=True)
    for name in ("topk_idx", "topk_logits"):
        shard[name] = shard[name][..., :-1].clone()
    torch.save(shard, path)


def evil(path):
    class Evil:
        def __reduce__(self):
            return print, ("unpickled",)

    torch.save({"input_ids": Evil()}, path)


def ancient(path):
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is no shard, or not all of one"),
        (empty, "is no shard, or not all of one"),
        (foreign, "holds no input_ids and no topk_idx and no topk_logits"),
        (no_dict, "holds no input_ids"),
        (shorter, r"topk_idx has shape \[3, 10, 5\] beside 3 rows of 12 tokens"),
        (fewer, "has other tensors than shard_00000.pt"),
        (evil, "is no shard, or not all of one"),
        (ancient, "torch's file format of before 1.6"),
    ],
)
def test_a_shard_that_is_none_is_named(older, damage, said, capsys):
    folder = older()
    damage(folder / "shard_00001.pt")
    with pytest.raises(ArtifactError, match=rf"shard_00001\.pt.*{said}"):
        rows_of(folder, "train")
    assert "unpickled" not in capsys.readouterr().out


def test_tokens_that_the_model_does_not_have_are_refused(older, recorded):
    with pytest.raises(ArtifactError, match=r"and the model only 100: it was made with another teacher \(tiny\)"):
        open_older(older(), 100, 0.3, Tail.exact)
    late = recorded["topk_idx"].clone()
    late[:] = VOCABULARY
    with pytest.raises(ArtifactError, match="a shard has token 512"):
        rows_of(older("late", topk_idx=late), "train")


def test_an_empty_split_is_refused(older):
    with pytest.raises(ConfigError, match=r"has no row for the eval split: change data.eval_fraction"):
        open_older(older(), VOCABULARY, 1e-9, Tail.exact)


def test_meta_of_another_format_is_refused(older):
    folder = older()
    (folder / "meta.json").write_text('{"format": "else"}')
    with pytest.raises(ArtifactError, match="describes no cache of the older scripts"):
        open_older(folder, VOCABULARY, 0.3, Tail.exact)


def test_our_own_cache_by_path(cache, tiny):
    assert open_local(cache.folder, tiny, 0.5, Tail.exact).key == cache.key


def test_cache_of_another_teacher_is_refused(cache, tiny):
    other = dataclasses.replace(tiny, name="other", fingerprint="f" * 12)
    with pytest.raises(
        ArtifactError, match="was recorded from tiny with other weights than those of other: use model=tiny"
    ):
        open_local(cache.folder, other, 0.5, Tail.exact)


def test_a_folder_above_a_cache_says_which_was_meant(cache, tiny, tmp_path):
    with pytest.raises(ArtifactError, match=r"so no teacher cache: did you mean .*text_L20"):
        open_local(cache.folder.parent, tiny, 0.5, Tail.exact)
    with pytest.raises(ArtifactError, match=r"so no teacher cache$"):
        open_local(tmp_path, tiny, 0.5, Tail.exact)


def test_an_artifact_of_another_kind_is_refused(documents, tiny):
    assert open_artifact(documents.folder)
    with pytest.raises(ArtifactError, match="is not a teacher cache but of kind documents"):
        open_local(documents.folder, tiny, 0.5, Tail.exact)
