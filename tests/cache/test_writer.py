"""What a cache holds, against the teacher's whole output distribution in float64."""

import dataclasses
import hashlib
import itertools
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qat import artifacts
from qat.cache import writer
from qat.cache.format import decode_ids, random_ids
from qat.cache.reader import CacheReader
from qat.config import Packing
from qat.data.documents import SPLITS, read_documents
from qat.data.packing import pack
from qat.errors import ConfigError, MissingError, NumericsError

SEED, LENGTH, TOP_K, RANDOM, VOCABULARY, END = 9, 20, 6, 10, 512, 257
HALF = 2.0**-11  # relative rounding of float16


@pytest.fixture(scope="module", params=Packing)
def cache(obtain, request):
    return obtain(packing=request.param)


@pytest.fixture(scope="module")
def shards(cache):
    """Split, number and tensors of every shard."""
    files = sorted(cache.folder.glob("*.safetensors"))
    return [(file.stem[:-6], int(file.stem[-5:]), load_file(file)) for file in files]


@pytest.fixture(scope="module")
def exact(tiny):
    """Log-probabilities [N, L-1, V] in float64, of each document alone; NaN where nothing counts."""
    model = tiny.load(torch.float64, torch.device("cpu"))

    def compute(tensors):
        ids, starts = tensors["input_ids"].long(), tensors["document_starts"]
        found = torch.full((*ids.shape, VOCABULARY), torch.nan, dtype=torch.float64)
        for row in range(len(ids)):
            begins = [*starts[row].nonzero().flatten().tolist(), ids.shape[1]]
            for first, last in itertools.pairwise(begins):
                with torch.inference_mode():
                    found[row, first:last] = model(ids[row : row + 1, first:last]).logits[0].log_softmax(-1)
        return found[:, :-1]

    return compute


def test_shards_hold_the_rows_of_their_split_in_order(cache, shards, documents, small_shards):
    packing = Packing[cache.manifest["packing"]]
    for split in SPLITS:
        mine = [tensors for name, _, tensors in shards if name == split]
        assert [len(part["input_ids"]) for part in mine[:-1]] == [small_shards] * (len(mine) - 1) and len(mine) > 1
        rows = pack(read_documents(documents, split), LENGTH, packing, END)
        for name in ("input_ids", "document_starts", "loss_mask"):
            assert torch.equal(torch.cat([part[name] for part in mine]), getattr(rows, name))
        assert cache.manifest["sequences"][split] == len(rows)
        assert cache.manifest["positions"][split] == rows.loss_mask.sum()


def test_training_and_evaluation_share_no_text(shards):
    seen = {"train": set(), "eval": set()}
    for split, _, tensors in shards:
        seen[split] |= set(tensors["input_ids"].flatten().tolist())
    assert seen["train"] & seen["eval"] == {END}


def test_top_tokens_and_log_probabilities_are_those_of_the_full_softmax_of_each_document_alone(shards, exact):
    for _, _, tensors in shards:
        best, ids = exact(tensors).topk(TOP_K)
        assert torch.equal(tensors["topk_ids"].long(), ids)
        stored = tensors["topk_logprobs"]
        assert stored.shape == (len(tensors["input_ids"]), LENGTH - 1, TOP_K)
        assert ((stored.double() - best).abs() <= HALF * best.abs() + 2e-5).all()


def test_types_are_those_of_the_format(shards):
    for _, _, tensors in shards:
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "input_ids": torch.int32,
            "document_starts": torch.uint8,
            "loss_mask": torch.uint8,
            "topk_ids": torch.uint16,
            "topk_logprobs": torch.float16,
            "random_logprobs": torch.float16,
        }


def test_tail_is_the_mass_outside_the_top_tokens(shards, exact):
    for _, _, tensors in shards:
        probabilities = exact(tensors).exp()
        tail = probabilities.scatter(-1, tensors["topk_ids"].long(), 0).sum(-1)
        stored = 1 - tensors["topk_logprobs"].double().exp().sum(-1)
        assert tail.max() > 0.1
        assert ((stored - tail).abs() < 2e-3).all()


def test_random_tokens_drawn_again_have_the_stored_log_probabilities(shards, exact):
    for split, number, tensors in shards:
        stored = tensors["random_logprobs"]
        ids = random_ids(SEED, split, number, tuple(stored.shape), VOCABULARY)
        wanted = exact(tensors).gather(-1, ids)
        assert stored.shape[-1] == RANDOM
        assert ((stored.double() - wanted).abs() <= HALF * wanted.abs() + 2e-5).all()


def test_random_sample_estimates_the_whole_mass(shards):
    drawn = torch.cat([tensors["random_logprobs"].flatten() for _, _, tensors in shards]).double()
    mass = drawn.exp() * VOCABULARY
    assert abs(mass.mean() - 1) < 5 * mass.std() / len(mass) ** 0.5


def test_a_large_vocabulary_is_recorded_exactly(tmp_path, documents):
    import transformers

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=70_000, **shape)).eval()
    with torch.no_grad():
        model.lm_head.weight[66_000:] *= 3  # what lies beyond 65,535 is what the model says
    meta = {"length": LENGTH, "packing": "joined", "seed": 1, "vocab_size": 70_000}
    rows = pack(read_documents(documents, "eval"), LENGTH, Packing.joined, END).first(3)
    shard = writer.Shard("eval", 0, rows, 4, 3)
    kept = writer.record(model, shard, meta, 2, lambda amount=1, note="": None)
    writer._write(shard, kept, 70_000, "key", tmp_path)
    stored = load_file(tmp_path / shard.name)
    ids = decode_ids(stored["topk_ids"], stored["topk_ids_high"], 70_000)
    assert torch.equal(ids.flatten(0, 1), kept["ids"]) and ids.max() > 65_535


def test_every_shard_says_which_it_is(cache):
    for file in cache.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"shard": f"{cache.key}/{file.name}"}


def test_description_is_in_the_folder_and_in_the_manifest(cache, documents, tiny):
    meta = json.loads((cache.folder / "meta.json").read_text())
    checksums = meta.pop("checksums")
    assert meta.items() <= cache.manifest.items()
    assert checksums == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in cache.folder.glob("*.safetensors")
    }
    assert meta["teacher"] == {"name": "tiny", "fingerprint": tiny.fingerprint}
    assert (meta["documents"], meta["vocab_size"], meta["format"]) == (documents.key, VOCABULARY, 3)
    assert meta["data"]["content"] == documents.manifest["inputs"]["content"]
    template = tiny.tokenizer().chat_template
    assert meta["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert cache.folder.name == f"text_L20_K6_R10-{cache.key}"
    assert {path.name for path in cache.folder.iterdir()} == {"manifest.json", "meta.json", *checksums}


def test_text_alone_is_the_text_of_the_whole_cache_without_a_word_from_the_teacher(obtain, tmp_path, monkeypatch):
    whole, asked = obtain(), []
    writer_record = writer.record

    def record(model, shard, *others):
        asked.append(shard.split)
        return writer_record(model, shard, *others)

    monkeypatch.setattr(writer, "record", record)
    alone = obtain(train_targets=False, artifacts=tmp_path)
    assert set(asked) == {"eval"} and alone.key != whole.key
    assert alone.folder.name == f"text_L20_K6_R10_text-{alone.key}"
    for file in sorted(whole.folder.glob("*.safetensors")):
        ours, theirs = load_file(alone.folder / file.name), load_file(file)
        for name, tensor in theirs.items():
            if file.name.startswith("train") and name == "random_logprobs":
                assert name not in ours
            elif file.name.startswith("train") and name in ("topk_ids", "topk_logprobs"):
                assert ours[name].shape == (*tensor.shape[:2], 0) and ours[name].dtype == tensor.dtype
            else:
                assert torch.equal(ours[name], tensor)
    batch = CacheReader(alone, "train").batch(torch.tensor([3, 0]))
    assert torch.equal(batch.input_ids, CacheReader(whole, "train").batch(torch.tensor([3, 0])).input_ids)
    assert batch.topk_ids.shape == batch.topk_logprobs.shape == (2, LENGTH - 1, 0)


def test_limit_is_on_training_sequences_alone(obtain):
    limited = obtain(sequences=7).manifest["sequences"]
    assert limited == {"train": 7, "eval": obtain().manifest["sequences"]["eval"]}


@pytest.mark.parametrize(
    "changed",
    [{"length": 19}, {"top_k": 5}, {"random": 9}, {"sequences": 7}, {"seed": 8}, {"packing": Packing.rows}],
)
def test_what_shapes_the_content_changes_the_key(obtain, changed):
    assert obtain(**changed).key != obtain().key


def test_other_documents_change_the_key(obtain, other_documents):
    assert obtain(other_documents).key != obtain().key


def test_machine_changes_neither_key_nor_content(obtain, cpu, tmp_path):
    cache, single = obtain(), dataclasses.replace(cpu, micro_batch=1)
    assert obtain(machine=single).folder == cache.folder
    again = obtain(machine=single, artifacts=tmp_path)
    assert again.key == cache.key
    for file in cache.folder.glob("*.safetensors"):
        one, other = load_file(file), load_file(again.folder / file.name)
        assert torch.equal(one["topk_ids"], other["topk_ids"])
        torch.testing.assert_close(one["topk_logprobs"], other["topk_logprobs"], rtol=2 * HALF, atol=1e-5)


def test_option_name_of_the_cache_changes_nothing(obtain):
    assert obtain(name="local").folder == obtain().folder


def test_too_little_text_is_refused_and_leaves_nothing(obtain, tmp_path):
    said = r"the eval split has \d+ of the text's \d+ tokens, .* cache\.length=600: .* data\.eval_fraction"
    with pytest.raises(ConfigError, match=said):
        obtain(length=600, artifacts=tmp_path)
    assert [path for path in (tmp_path / "caches").iterdir() if path.suffix != ".lock"] == []


def test_a_full_disk_is_told_before_anything_is_computed(obtain, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 2000})
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(writer, "record", lambda *_: pytest.fail("computed"))
    rows = sum(obtain().manifest["sequences"].values())
    wanted = f"the cache of {rows} rows needs {rows * (20 * 5 + 19 * (1 + 6 * 4 + 10 * 2)) / 1000:.3g} kB in "
    with pytest.raises(MissingError, match=re.escape(wanted) + ".* and 2 kB are free there"):
        obtain(artifacts=tmp_path)


def test_a_teacher_that_is_not_finite_is_refused(obtain, tmp_path, monkeypatch):
    def broken(*arguments):
        kept = writer_record(*arguments)
        kept["topk_logprobs"] = kept["topk_logprobs"].clone()
        kept["topk_logprobs"][3, 2] = torch.nan
        return kept

    writer_record = writer.record
    monkeypatch.setattr(writer, "record", broken)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        obtain(artifacts=tmp_path)
