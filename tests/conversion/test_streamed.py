"""Conversions whose decoder layers are read one at a time: the same bytes as those of models in memory."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qat import checkpoints
from qat.checkpoints.native import FITTED
from qat.config import Config, ConvertConfig, KMeansBackend, KMeansConfig, QuantConfig, TrackerConfig, TrackerKind
from qat.config import WeightConfig as W
from qat.conversion.convert import STACK_BYTES
from qat.errors import ConfigError
from qat.models import ModelFolder, streamed
from qat.models import tiny as tiny_model
from qat.quant.places import matrix
from qat.runs import Run
from qat.stages import convert
from qat.stages.workspace import Workspace
from qat.tensor_files import Writer, entries
from tests import tiny

QUANTS = {
    "embedding": (replace(tiny.QUANT, embed=W(bits=4, rank=1)), ConvertConfig(rounds=1, sweeps=1)),
    "ends": (replace(tiny.QUANT, embed=W(bits=4, rank=1), head=W(bits=2, rank=1)), ConvertConfig(rounds=1)),
    "thorough": (tiny.QUANT, ConvertConfig(rounds=1, sweeps=1, passes=2, gradients=True)),
    "twice": (tiny.QUANT, ConvertConfig(rounds=1, passes=2)),
    "budget": (
        QuantConfig("budget", bits=5, candidates=[W(bits=2, rank=1), W(bits=4, rank=1)]),
        ConvertConfig(rounds=1),
    ),
}


CASES = [
    ("qwen3", True, "embedding"),
    ("llama", False, "ends"),
    ("mixtral", False, "budget"),
    ("gemma3_text", True, "thorough"),
]


def family(name, folder, tied, dtype=torch.float32):
    """A tiny model of a family as a folder, with the byte tokenizer of the tiny model."""
    tiny_model.write(folder, 512)
    settings = zoo.small(CONFIG_MAPPING[name]())
    settings.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).to(dtype)
    for leftover in folder.glob("*.safetensors"):
        leftover.unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return ModelFolder(name, folder, f"{name}{tied}")


def cache_of(teacher, folder):
    """A cache of it as small as it can be."""
    (folder / "cache").mkdir()
    return tiny.cache_of(teacher, folder / "cache", paragraphs=16)


def converted(teacher, cache, outputs, quant):
    """SHA-256 of every file of a conversion, but for seconds."""
    config = Config(outputs=str(outputs))
    config.quant, settings = QUANTS[quant]
    config.convert = replace(settings, calibration_tokens=128)
    config.kmeans = KMeansConfig("exact", KMeansBackend.exact)
    config.cache.name = config.mode.name = "tiny"
    config.tracker = TrackerConfig("none", TrackerKind.none)
    (outputs / "run").mkdir(parents=True, exist_ok=True)
    fresh = ModelFolder(teacher.name, teacher.path, teacher.fingerprint)
    made = convert.make(Workspace(config, Run(config, outputs / "run"), tiny.FP32, fresh, fresh), cache)
    found = {one: hashlib.sha256((made.folder / one).read_bytes()).hexdigest() for one in made.manifest["files"]}
    figures = {name: {k: v for k, v in of.items() if k != "seconds"} for name, of in made.manifest["figures"].items()}
    return found, figures, made.manifest["metrics"]


@pytest.fixture(autouse=True)
def tiny_ones_too(monkeypatch):
    """No model is too small to be read layer by layer."""
    monkeypatch.setattr("qat.models.folder.FEW", 0)


@pytest.fixture
def in_memory(monkeypatch):
    """From here on, no model is read layer by layer."""

    def begin():
        def refuse(*_, **__):
            raise NotImplementedError("this test wants it in memory")

        monkeypatch.setattr(streamed, "open_stream", refuse)

    return begin


@pytest.mark.parametrize(("name", "tied", "quant"), CASES)
def test_a_conversion_layer_by_layer_has_the_bytes_of_one_in_memory(tmp_path, in_memory, name, tied, quant):
    teacher = family(name, tmp_path / "model", tied)
    cache = cache_of(teacher, tmp_path)
    assert not teacher.unstreamed(torch.float32, tiny.CPU)
    found = converted(teacher, cache, tmp_path / "streamed", quant)
    in_memory()
    assert found == converted(teacher, cache, tmp_path / "whole", quant)
    assert checkpoints.FILE in found[0] and found[2]["after"]["kl"] > 0


class Killed(BaseException):
    """What no handler of the project's takes."""


@pytest.fixture
def until_done(monkeypatch):
    """Has a conversion, killed once a layer is put away after some others are there for good, go on until it is done.

    Returns what it gives and how often it went on; each time that it was killed, something may be done meanwhile.
    """
    monkeypatch.setitem(STACK_BYTES, "cpu", 6e4)  # each decoder layer by itself, of the embedding many rows at a time
    note, put = checkpoints.Shelf.note, checkpoints.Shelf.put

    def go(convert, meanwhile=lambda: None):
        noted, goes = [], 0

        def keep(shelf, figures):
            note(shelf, figures)
            noted.append(shelf)

        def refuse(shelf, name, module):
            put(shelf, name, module)
            if noted:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.Shelf, "note", keep)
            patch.setattr(checkpoints.Shelf, "put", refuse)
            while True:
                goes += 1
                noted.clear()
                try:
                    return convert(), goes
                except Killed:
                    meanwhile()

    return go


def test_a_conversion_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path, until_done):
    teacher = family("qwen3", tmp_path / "model", True)
    cache = cache_of(teacher, tmp_path)
    found = converted(teacher, cache, tmp_path / "whole", "embedding")
    (tmp_path / "goes").mkdir()
    assert until_done(partial(converted, teacher, cache, tmp_path / "goes", "embedding")) == (found, 3)


def flipped(path):
    """Changes a bit in the middle of the numbers that were put."""
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    there = [place for place in range(header, len(content)) if content[place]]
    content[there[len(there) // 2]] ^= 1
    path.write_bytes(content)


def begun_by_another(path):
    """Leaves the file as a process of another machine does that is killed before it has noted anything."""
    stored, _ = entries(path, "")
    Writer(path, {name: (one.kind, one.shape) for name, one in stored.items()})


def altered(path):
    """Has the note tell another error of some layer."""
    note = path.with_name(f".{path.name}{FITTED}")
    said = json.loads(note.read_text())
    next(iter(said["figures"].values()))["output_error"] *= 2
    note.write_text(json.dumps(said))


HARMS = {
    "a bit of the first pass": ("pass1.safetensors", flipped),
    "the end of the first pass": ("pass1.safetensors", lambda path: os.truncate(path, 100)),
    "another's file": (checkpoints.FILE, begun_by_another),
    "another error in the note": (checkpoints.FILE, altered),
}


def test_what_a_killed_conversion_left_is_used_as_it_left_it_or_not_at_all(tmp_path, until_done):
    """In two passes, the second of which is begun where each harm is done to a copy of what is left."""
    teacher = family("llama", tmp_path / "model", False)
    cache = cache_of(teacher, tmp_path)
    found = converted(teacher, cache, tmp_path / "whole", "twice")
    (tmp_path / "goes").mkdir()

    def copied():
        (left,) = (tmp_path / "goes" / "artifacts" / "checkpoints").glob(".*.partial")
        if (left / f".{checkpoints.FILE}{FITTED}").exists() and not list(tmp_path.glob("* *")):
            for harm in HARMS:
                shutil.copytree(tmp_path / "goes", tmp_path / harm)

    assert until_done(partial(converted, teacher, cache, tmp_path / "goes", "twice"), copied) == (found, 4)
    for harm, (name, does) in HARMS.items():
        (left,) = (tmp_path / harm / "artifacts" / "checkpoints").glob(".*.partial")
        does(left / name)
        assert converted(teacher, cache, tmp_path / harm, "twice") == found, harm


def test_a_streamed_model_is_the_loaded_one_and_has_one_decoder_layer_in_memory(tmp_path):
    teacher = family("mixtral", tmp_path, False, torch.bfloat16)
    ids = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        loaded, model = teacher.load(dtype, tiny.CPU), teacher.stream(dtype, tiny.CPU)
        layers, seen = streamed.stream_of(model).layers, []
        note = partial(_note, layers, seen)
        for layer in layers:
            layer.register_forward_hook(note)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
        assert seen == [[one is other for one in layers] for other in layers]
        assert model.dtype == dtype and model.lm_head.weight.dtype == dtype
    twin, weight = teacher.stream(dtype, tiny.CPU, model), teacher.matrices()
    assert twin.lm_head.weight is model.lm_head.weight
    exact = teacher.load(torch.float32, tiny.CPU)
    for name in ("model.layers.1.mlp.experts.2.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        assert weight(name).dtype == torch.float32 and torch.equal(weight(name), matrix(exact, name))


def _note(layers, seen, *_):
    seen.append([not layer.mlp.gate.weight.is_meta for layer in layers])


def test_matrices_take_the_place_of_those_in_the_files(tmp_path):
    teacher = family("qwen3", tmp_path, True)
    model, ids = teacher.stream(torch.float32, tiny.CPU), torch.arange(24).view(2, 12)
    other, expected = teacher.load(torch.float32, tiny.CPU), None
    made = {}
    for name in ("model.layers.1.mlp.up_proj", "model.embed_tokens"):
        made[name] = torch.randn(matrix(other, name).shape, generator=torch.Generator().manual_seed(0))
        matrix(other, name).data.copy_(made[name])
    streamed.stream_of(model).put({name: lambda name=name: made[name] for name in made})
    with torch.no_grad():
        expected = other(ids).logits
        assert torch.equal(model(ids).logits, expected) and torch.equal(model(ids).logits, expected)


def test_a_damaged_layer_is_refused_by_name(tmp_path):
    teacher = family("qwen3", tmp_path / "whole", True)
    model = teacher.load(torch.float32, tiny.CPU)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"NaN or infinite in model\.layers\.1\.mlp\.up_proj\.weight"):
        ModelFolder("broken", tmp_path / "broken", "broken").stream(torch.float32, tiny.CPU)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    state.pop("lm_head.weight")
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        ModelFolder("broken", tmp_path / "broken", "lacking").stream(torch.float32, tiny.CPU)


def test_a_model_that_cannot_be_run_layer_by_layer_is_loaded_and_says_why(tmp_path):
    teacher = family("gemma3n_text", tmp_path, True)
    assert "decoder layer" in teacher.unstreamed(torch.float32, tiny.CPU)
    assert streamed.stream_of(teacher.stream(torch.float32, tiny.CPU)) is None
