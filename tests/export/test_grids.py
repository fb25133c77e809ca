"""What is on no grid of an engine is refused by name, with the preset that would be."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qat.cli import arguments, main
from qat.config import Config, ExportConfig, ExportType
from qat.errors import ConfigError, UnavailableError
from qat.export import compressed, mlx
from qat.export.exporter import exporter
from qat.export.grids import presets
from tests import described

GRIDS = {name: exporter(name).grid for name in ("mlx", "compressed")}


def grid(bits=4, group=64, levels="shifted", row=576):
    return {"shape": [64, row], "format": "grid", "bits": bits, "group": group, "levels": levels}


OLDER = {"shape": [64, 576], "format": "grid", "bits": 3, "group": 64, "shifts": True}
FITS = "a student made with quant={} fits; export=hf is dense, and takes any"
REFUSED = [
    ("mlx", {"shape": [64, 576], "bits": 2, "rank": 8}, "format codebook, bits 2, rank 8: ", "mlx_2bit_g64"),
    ("mlx", grid(levels="halves"), "levels halves: ", "mlx_4bit_g64"),
    ("mlx", grid(bits=7), "bits 7, group 64, levels shifted: ", "mlx_6bit_g64"),
    ("mlx", grid(group=16, row=48), "groups of 32 or 64 or 128 do not divide rows of 48 weights; export=hf", ""),
    ("mlx", grid(group=48, row=96), "a student made with quant=mlx_4bit_g64 in groups of 32, quant.mlp.group=32", ""),
    ("compressed", grid(), "levels shifted: ", "compressed_w4_g64"),
    ("compressed", grid(levels="iq4nl"), "levels iq4nl: ", "compressed_w4_g64"),
    ("compressed", OLDER, "shifts true: ", "compressed_w3_g64"),
]


@pytest.mark.parametrize(("engine", "layer", "said", "preset"), REFUSED)
def test_a_layer_on_another_grid_is_refused_with_the_preset_that_fits(engine, layer, said, preset):
    with pytest.raises(ConfigError) as refused:
        GRIDS[engine].refuse({"model.layers.0.mlp.up_proj": layer})
    assert said + (FITS.format(preset) if preset else "") in str(refused.value)
    assert "cannot hold model.layers.0.mlp.up_proj, which is in" in str(refused.value)


@pytest.mark.parametrize("engine", GRIDS)
def test_experts_are_refused_before_anything_is_made(engine):
    with pytest.raises(ConfigError, match=r"has no place for model\.layers\.0\.mlp\.experts\.1\.gate_up_proj, which"):
        GRIDS[engine].refuse({"model.layers.0.mlp.experts.1.gate_up_proj": grid(levels="integers")})


@pytest.mark.parametrize("engine", GRIDS)
def test_layers_that_are_not_torchs_own_are_refused(engine):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=8))
    export = ExportConfig(engine, engine, ExportType.fp16)
    exporter(engine).refuse_classes(model, ["lm_head", "transformer.wte"], export)
    with pytest.raises(ConfigError, match=rf"^export={engine}: transformer\.h\.0\.mlp\.c_fc is a Conv1D in this"):
        exporter(engine).refuse_classes(model, ["lm_head", "transformer.h.0.mlp.c_fc"], export)


def test_what_an_engine_stores_is_taken():
    for bits in (2, 3, 4, 6, 8):
        GRIDS["mlx"].refuse({"it": grid(bits=bits)})
        GRIDS["mlx"].refuse({"it": grid(bits=bits, group=32, levels="integers")})
        GRIDS["compressed"].refuse({"it": grid(bits=bits, group=48, levels="integers")})
    GRIDS["mlx"].refuse({"it": {"shape": [64, 576], "format": "grid", "bits": 4, "group": 64, "shifts": True}})


def test_a_role_that_an_engine_has_dense_may_be_in_any_format():
    GRIDS["compressed"].refuse({"model.embed_tokens": {"kind": "embed", "shape": [512, 64], "bits": 4, "rank": 8}})


def test_every_preset_of_an_engine_is_on_its_grid():
    for engine in GRIDS.values():
        found = presets(engine.presets)
        assert found
        for name, option in found.items():
            assert engine.holds(option), name


@pytest.mark.parametrize(("module", "needs"), [(mlx, "mlx-lm"), (compressed, "compressed-tensors")])
def test_an_engine_that_is_not_installed_is_told_before_anything_is_done(module, needs, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = Config(export=ExportConfig("it", "it", ExportType.fp16))
    said = rf"^export=it is read back by {needs}: run `pip install -e '\.\[engines"
    with pytest.raises(UnavailableError, match=said):
        module.EXPORTER.refuse(config)


def test_the_command_line_refuses_before_a_run_has_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "manifest.json").write_text(json.dumps(described.checkpoint()))
    typed = ["stage=export", "export=compressed", "export.output=new", "checkpoint=made"]
    with pytest.raises(ConfigError, match=r"^compressed-tensors cannot hold .*, which is in format codebook"):
        main.check(arguments.parse(typed))
