"""What `config.json` shows not to work is refused before a run has a number, a folder or a tracker."""

import json
import shutil

import pytest
from transformers import LlamaConfig

import qat
from qat import models
from qat.cli import main
from qat.config import ModelConfig, ModelSource
from qat.errors import ConfigError
from qat.models import sources
from tests import tiny

GROUPS = "quant=g4a4_g64 quant.mlp.group=48"
TOLD = "quant.mlp.group=48: model.layers.0.mlp.gate_proj of {} has rows of 64 weights, which groups of 48 do not divide"
REFUSED = [
    (GROUPS, TOLD),
    (f"stage=convert {GROUPS}", TOLD),
    ("quant.attn.rank=33", "so no rank above 32 adds anything"),
    ("stage=convert quant=gguf_q4_k", "has rows of 64 weights, which blocks of 256 do not divide"),
    ("stage=convert export=mlx", "MLX cannot hold model.layers.0.self_attn.q_proj"),
    ("export=compressed", "cannot hold model.layers.0.self_attn.q_proj"),
    ("quant=budget quant.megabytes=0.001", "quant.megabytes=0.001 is less than the smallest formats"),
    ("mode=lora mode.rank=40", "mode.rank=40: model.layers.0.self_attn.k_proj of {} is 32 × 64 and has no more than"),
    ("cache.length=1025", "cache.length=1025: {} is made for at most 1024 tokens"),
    ("train.learn.scales=0 train.learn.codebooks=0", "nothing would learn"),
]


def refused(line: str, here, capfd) -> str:
    """What a command says that is refused, and leaves nothing behind."""
    before = sorted(here.rglob("*"))
    assert main.main([*line.split(), "tracker=wandb"], lambda: pytest.fail("launched")) == 2
    assert sorted(here.rglob("*")) == before
    (said,) = capfd.readouterr().err.splitlines()
    return said


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["tiny", "own"])
def model(request, here, teacher):
    """Words for a model, and its name in messages."""
    if request.param == "tiny":
        return "model=tiny", "tiny"
    shutil.copytree(teacher.path, here / "own")
    return "model=local model.path=own", "own"


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_shapes_are_refused_before_anything_is_made(here, model, words, told, capfd):
    said, name = model
    assert told.format(name) in refused(f"{said} cache.top_k=8 {words}", here, capfd)


def test_a_sweep_is_refused_for_one_of_its_jobs(here, capfd):
    line = "-m model=tiny quant=g4a4_g64 quant.mlp.group=64,48 stage=convert"
    assert TOLD.format("tiny") in refused(line, here, capfd)


def test_the_library_makes_nothing_either(here, teacher):
    with pytest.raises(ConfigError, match="which groups of 48 do not divide"):
        qat.convert(
            teacher.path, {"mlp": {"format": "grid", "bits": 4, "group": 48}}, ["a text"] * 20, outputs="outputs"
        )
    assert not list(here.glob("outputs/SR-*")) and not list(here.glob("outputs/.ids/*"))


def test_a_gguf_file_is_judged_by_its_header(here, capfd, monkeypatch):
    monkeypatch.setattr(sources, "dequantize", lambda *_: pytest.fail("made"))
    said = refused("stage=convert quant=gguf_q4_k", here, capfd)
    assert "model.layers.0.self_attn.q_proj of smollm2_135m has rows of 576 weights" in said


def test_of_a_hub_repository_its_config_alone_is_fetched(here, capfd, monkeypatch):
    def fetched(repo, revision, allow_patterns):
        assert (repo, allow_patterns) == ("Qwen/Qwen3-0.6B", ["config.json"])
        LlamaConfig(hidden_size=96, intermediate_size=192, num_attention_heads=4).save_pretrained(here.parent / "hub")
        return str(here.parent / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    said = refused("model=qwen3_0_6b stage=convert quant=g4a4_g64", here, capfd)
    assert "of qwen3_0_6b has rows of 96 weights, which groups of 64 do not divide" in said


def test_a_quantized_folder_is_judged_as_what_it_becomes(here, teacher):
    shutil.copytree(teacher.path, here / "own")
    described = json.loads((here / "own" / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8"}
    (here / "own" / "config.json").write_text(json.dumps(described))
    found = models.described(ModelConfig("local", ModelSource.folder, path="own"), here)
    shapes = {name: value.shape for name, value in found.skeleton().named_parameters()}
    assert shapes == {name: value.shape for name, value in teacher.skeleton().named_parameters()}


def test_what_is_described_has_the_shapes_of_what_is_made(here, teacher):
    described = models.described(ModelConfig("tiny", ModelSource.tiny), here)
    made = models.locate(ModelConfig("tiny", ModelSource.tiny), here)
    assert described.context() == made.context() and described.vocab_size() == made.vocab_size()
    for name, parameter in made.load(tiny.FP32.dtype, tiny.FP32.device).named_parameters():
        assert described.skeleton().get_parameter(name).shape == parameter.shape
