"""What is typed for a key that holds text arrives letter by letter, whatever else it could be read as."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qat.cli import main, recorded, words
from qat.cli.arguments import parse
from qat.config import Config, RunConfig

LOOKALIKES = ["695e0514", "10e2", "1e3", "nan", "-inf", "007", "1_000", "0x1F", "1:30", "2026-01-01", "true", "OFF"]
LOOKALIKES += ["null", "NULL", "~", ".5", "1.", "[draft]", "{a:1}", "1e3 steps", "yes"]


@pytest.mark.parametrize("text", LOOKALIKES)
def test_words_of_the_command_line(text, compose):
    config = compose(f"run.notes={text}", f"+run.goal={text}", f"tracker.project='{text}'")
    assert (config.run.notes, config.run.goal, config.tracker.project) == (text, text, text)


def test_words_of_files(compose, here):
    plain = [word for word in LOOKALIKES if word[0] not in "[{" and " " not in word]
    for text in plain:
        assert words.as_text(f"run:\n  notes: {text}\n", Config) == {"run": {"notes": text}}
    (here / "own" / "experiment").mkdir(parents=True)
    listed = ", ".join(f"'{text}', {text}x" for text in plain)
    written = f"run:\n  notes: 1e3\n  goal: ~\nexport:\n  output: 'null'\ndata:\n  path: [{listed}]\n"
    (here / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{written}")
    config = compose("--config-dir", "own", "+experiment=mine", "stage=convert", "cache.path=own")
    assert (config.run.notes, config.run.goal, config.export.output) == ("1e3", "~", "null")
    assert config.data.path == [word for text in plain for word in (text, f"{text}x")]


def test_null_is_none_where_a_key_may_be_none(compose):
    config = compose("model.path=null", "data.path=Null", "store.archive=null")
    assert (config.model.path, config.data.path, config.store.archive) == (None, None, None)


def test_lists_sections_and_parts(compose, here):
    for name in ("1e3", "007"):
        (here / name).write_text("a text\n")
    parts = "[{source:text,path:1e3,weight:1e1},{source:text,path:[1e3,007]}]"
    config = compose("stage=cache", "data=mix", f"data.parts={parts}", "run={notes:1e3}", "evaluate={sample_tokens:9}")
    assert [part.path for part in config.data.parts] == ["1e3", ["1e3", "007"]]
    assert (config.data.parts[0].weight, config.run.notes, config.evaluate.sample_tokens) == (10.0, "1e3", 9)


def test_folders(compose, here):
    (here / "1e3").mkdir()
    (here / "1e3" / "config.json").write_text('{"model_type": "llama"}')
    (here / "1e3" / "model.safetensors").touch()
    config = compose("model=local", "model.path=1e3", "outputs=12e4", "hydra.run.dir=2e5")
    assert (config.model.path, config.outputs) == ("1e3", "12e4")
    assert parse(["hydra.run.dir=2e5"]).overrides == ["hydra.run.dir='2e5'"]


@pytest.mark.parametrize("values", ["1e3,2e3,x", "choice(1e3,2e3,x)", "shuffle(1e3,2e3,x)"])
def test_words_of_a_sweep(values, here):
    command = parse(["-m", f"run.notes={values}", "train.steps=1e1"])
    configs = main.check(command).configs
    assert sorted(config.run.notes for config in configs) == ["1e3", "2e3", "x"]
    assert {config.train.steps for config in configs} == {10}


def test_numbers_and_switches_stay_what_they_are(compose):
    config = compose("train.lr=1e-3", "mode.mlp=TRUE", "instance.compile=True", "data.thinking=false")
    assert (config.train.lr, config.mode.mlp, config.instance.compile, config.data.thinking) == (
        1e-3,
        True,
        "true",
        "false",
    )


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(LOOKALIKES))
def test_what_is_recorded_is_read_again(text):
    written = recorded.written(Config(run=RunConfig(notes=text, goal=text)))
    node = words.as_text(written, Config)["run"]
    again = yaml.safe_load(written)["run"]
    assert node["notes"] == again["notes"] == text.replace("${", r"\${")


def test_a_recorded_run_keeps_its_words(launch, here):
    launch("run.notes=695e0514", "run.goal=null")
    done = launch("--config-path", "outputs/SR-001")
    assert (done.code, done.err) == (0, "")
    recorded = [yaml.safe_load((here / "outputs" / f"SR-00{i}/config_resolved.yaml").read_text()) for i in (1, 2)]
    assert [run["run"]["notes"] for run in recorded] == ["695e0514"] * 2
    assert [run["run"]["goal"] for run in recorded] == ["null"] * 2
    result = json.loads((here / "outputs/SR-001/result.json").read_text())
    assert result["overrides"] == ["run.notes='695e0514'", "run.goal='null'"]


def test_an_own_option_is_called_like_its_file(compose, here):
    (here / "own" / "quant").mkdir(parents=True)
    (here / "own" / "quant" / "1e3.yaml").write_text("# mine\nmlp: {bits: 2, rank: 16}\nattn: null\n")
    (here / "own" / "quant" / "based.yaml").write_text("# on another\ndefaults:\n  - q2a4\nmlp: {bits: 3}\n")
    (here / "own" / "quant" / "named.yaml").write_text("# named\nname: 1e4\nmlp: {bits: 2, rank: 4}\nattn: null\n")
    names = [compose("--config-dir", "own", f"quant={option}").quant.name for option in ("1e3", "based", "named")]
    assert names == ["1e3", "based", "1e4"]
