"""Every file in conf/ composes, is valid and says what it is."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest

from qat.cli import schema
from qat.cli.helping import describe, page
from qat.config import CONF, LossKind, Stage, WeightConfig
from qat.errors import ConfigError

OPTIONS = [sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in schema.groups()]
ROWS = list(zip_longest(*OPTIONS))  # the nth option of every group at once: composing takes a while
NEEDED = {  # what an option cannot work without
    "model/local": "model.path={folder}",
    "quant/budget": "quant.bits=3.2",
    "data/chat_jsonl": "data.path={folder}/config.json",
    "data/text": "data.path={folder}/config.json",
    "loss/sft": "data.parts=[{{source: chat_jsonl, path: {folder}/config.json}}]",
    "cache/local": "cache.path={folder}",
    "checkpoint/local": "checkpoint.path={folder}/student.pt",
    "store/gcs": "store.path=gs://bucket",
    "store/hf": "store.path=owner/name",
    "store/url": "store.path=file:///tmp",
}


@pytest.mark.parametrize("names", ROWS, ids=lambda names: " ".join(filter(None, names)))
def test_options_compose_and_are_valid(names, compose, here):
    (here / "config.json").write_text('{"vocab_size": 49152, "model_type": "llama"}')
    (here / "model.safetensors").touch()
    (here / "student.pt").touch()
    chosen = {group: name for group, name in zip(schema.groups(), names, strict=True) if name}
    needed = [NEEDED[f"{group}/{name}"] for group, name in chosen.items() if f"{group}/{name}" in NEEDED]
    words = [f"{group}={name}" for group, name in chosen.items()]
    config = compose("stage=convert", *words, *(word.format(folder=here) for word in needed))
    for group, name in chosen.items():
        assert getattr(config, group).name == name


@pytest.mark.parametrize(
    "preset",
    [f"{path.parent.name}={path.stem}" for group in schema.EXTRAS for path in sorted((CONF / group).glob("*.yaml"))],
)
def test_presets_compose_and_are_valid(preset, compose):
    assert compose(preset).run.goal


def test_every_option_says_what_it_is():
    shown = " ".join(page([]).split())
    for option in CONF.glob("*/*.yaml"):
        said = describe(option)
        assert len(said) > 5, option
        assert re.search(rf"\b{option.stem} +{re.escape(said)}", shown), option


def test_every_group_has_a_folder_and_every_folder_a_group():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
    assert folders == {*schema.groups(), *schema.EXTRAS}


def test_defaults(compose):
    config = compose()
    names = {group: getattr(config, group).name for group in schema.groups()}
    assert names == {
        "model": "smollm2_135m",
        "data": "selfgen",
        "quant": "q2a4",
        "kmeans": "exact",
        "convert": "fast",
        "cache": "L64",
        "mode": "mlp",
        "loss": "bucket_kl",
        "checkpoint": "teacher",
        "instance": "auto",
        "store": "local",
        "tracker": "wandb",
        "export": "hf",
    }
    assert config.quant.mlp == WeightConfig(2, 32)
    assert config.quant.attn == WeightConfig(4, 8)


@pytest.mark.parametrize("written", ["experiment=sr_001", "+experiment=sr_001"])
def test_experiment_sets_groups_and_keys(written, compose):
    config = compose(written, "train.batch_size=8")
    assert config.stage is Stage.run
    assert config.checkpoint.name == "q4_fp32"
    assert config.loss.kind is LossKind.topk_kl
    assert (config.train.steps, config.train.batch_size) == (2000, 8)


def test_command_line_outranks_an_experiment(compose):
    assert compose("quant=q4a4", "+experiment=sr_001").quant.name == "q4a4"


def test_wrong_field_in_an_option_is_refused(compose, here: Path):
    (here / "own" / "loss").mkdir(parents=True)
    (here / "own" / "loss" / "mine.yaml").write_text("# mine\nkinds: topk_kl\n")
    with pytest.raises(ConfigError, match=r"unknown key loss\.kinds \(did you mean loss\.kind\?\)"):
        compose("--config-dir", "own", "loss=mine")
