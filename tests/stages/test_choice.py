"""A budget from the command line to a file of that size, and its choice used again."""

import json
from pathlib import Path

import pytest
import yaml

from qat import checkpoints
from qat.artifacts import read_manifest
from qat.cli import arguments, main
from qat.errors import ConfigError
from qat.quant.formats import Codebook
from qat.stages import run_job
from tests.stages.conftest import write_text

CANDIDATES = "quant.candidates=[{bits:2,rank:2},{bits:4,rank:2}]"
NAMED = "quant.layers={*.0.*.v_proj:{bits:8,rank:1},*.1.*.v_proj:null}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("choice")
    write_text(place / "text.txt")

    def make(*words):
        folder = place / "outputs" / f"SR-{len(list(place.glob('outputs/SR-*'))) + 1:03d}"
        line = ["+debug=tiny", "data=text", f"data.path={place / 'text.txt'}", f"outputs={place / 'outputs'}", *words]
        config = main.check(arguments.parse(line)).configs[0]
        folder.mkdir(parents=True)
        run_job(config, folder)
        return folder, json.loads((folder / "result.json").read_text())

    return make


@pytest.fixture(scope="module")
def chosen(run):
    return run("stage=convert", "quant=budget", CANDIDATES, NAMED, "quant.megabytes=0.07")


def formats(result):
    manifest = read_manifest(Path(result["paths"]["conversion"]))
    return {layer.name: layer.format for layer in checkpoints.layers_of(manifest)}


def test_a_budget_is_kept_and_what_is_named_stays(chosen):
    _, result = chosen
    found = formats(result)
    assert 67_000 < result["quant"]["file_bytes"] <= 70_000
    assert found.pop("model.layers.0.self_attn.v_proj") == Codebook(8, 1)
    assert "model.layers.1.self_attn.v_proj" not in found and "model.embed_tokens" in found
    assert set(found.values()) == {Codebook(2, 2), Codebook(4, 2)}


def test_a_choice_is_kept_in_the_run_and_beside_what_was_converted_so(chosen):
    folder, result = chosen
    kept = json.loads((Path(result["paths"]["conversion"]) / "choice.json").read_text())
    assert kept == json.loads((folder / "choice.json").read_text())
    assert {name: Codebook(one["bits"], one["rank"]) for name, one in kept["layers"].items()} == formats(result)


def test_a_choice_is_an_option_that_can_be_edited(chosen, run, tmp_path):
    folder, result = chosen
    option = yaml.safe_load((folder / "quant.yaml").read_text())
    option["layers"]["*.1.mlp.*"] = {"bits": 3, "rank": 1}
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "mine.yaml").write_text(yaml.safe_dump(option, sort_keys=False))
    edited = formats(run("stage=convert", "--config-dir", str(tmp_path), "quant=mine")[1])
    expected = formats(result) | dict.fromkeys((name for name in edited if ".1.mlp." in name), Codebook(3, 1))
    assert edited == expected


def test_another_budget_shares_what_was_measured(chosen, run):
    _, result = run("stage=convert", "quant=budget", CANDIDATES, NAMED, "quant.bits=5")
    assert "choose" in result["reused"] and result["quant"]["model_bits_per_weight"] <= 5
    assert formats(result) != formats(chosen[1])


def test_too_small_a_budget_makes_nothing(chosen, run):
    with pytest.raises(ConfigError, match=r"0\.01 is less than .* set quant\.megabytes=0\.\d+ or more"):
        run("stage=convert", "quant=budget", CANDIDATES, "quant.megabytes=0.01")
