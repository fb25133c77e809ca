"""A recorded run is data: values of our own keys are read, and whatever else somebody put there runs nothing."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qat import references
from qat.cli import arguments, main, recorded, trusted
from qat.config import Config, RunConfig
from qat.errors import ConfigError

TARGET = {"_target_": "os.system", "command": "touch owned"}
FOREIGN = {
    "callbacks": {"hydra": {"callbacks": {"evil": TARGET}}},
    "launcher": {"hydra": {"launcher": TARGET}},
    "searchpath": {"hydra": {"searchpath": ["file:///tmp"]}},
    "target": {"_target_": "os.system"},
    "target inside": {"train": {"_target_": "os.system", "_convert_": "all"}},
    "target in any": {"data": {"path": TARGET}},
    "target in a list": {"data": {"parts": [TARGET]}},
    "partial": {"model": {"_partial_": True}},
    "defaults": {"defaults": ["schema", {"override hydra/launcher": "joblib"}]},
    "defaults inside": {"train": {"defaults": ["/hydra/launcher"]}},
    "environment": {"run": {"notes": "${oc.env:HOME}"}},
    "decode": {"train": {"steps": "${oc.decode:7}"}},
    "hydra's": {"outputs": "a/${hydra:runtime.cwd}"},
    "create": {"data": {"path": ["${oc.create:{_target_: x}}"]}},
    "own key": {"seed": "${train.steps}"},
    "twice escaped": {"run": {"goal": "\\\\${oc.env:HOME}"}},
    "unknown": {"trian": {"lr": 1}},
    "unknown of a layer": {"quant": {"layers": {"*.q_proj": {"bits": 2, "_target_": "os.system"}}}},
    "no section": {"train": {"lr": {"a": 1}}},
}
FORMS = {
    "a tag": "run: !!python/object/apply:os.system ['touch owned']\n",
    "a tag of text": "run: {notes: !!binary aGk=}\n",
    "an alias": "run: &a {notes: x}\ndata: *a\n",
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)),
    "depth": "run: " + "[" * 1_000 + "]" * 1_000,
    "depth of blocks": "\n".join(" " * n + "a:" for n in range(1_000)),
    "no mapping": "- run\n",
    "nothing": "",
    "no YAML": "run: {\n",
    "twice": "seed: 1\nseed: 2\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "size": "run: {notes: '" + "x" * 300_000 + "'}\n",
    "a number for a key": "1: 2\n",
    "a huge number": "seed: " + "9" * 5_000 + "\n",
}


def foreign(content) -> bytes:
    return (content if isinstance(content, str) else yaml.safe_dump(content)).encode()


@pytest.fixture
def refused(here, capfd, monkeypatch):
    """Expects one sentence and exit code 2, and that nothing was made or run."""

    def check(*words: str) -> str:
        before = sorted(map(str, here.rglob("*")))
        assert main.main(list(words), lambda: pytest.fail("launched")) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and len(said) < 2_000
        assert sorted(map(str, here.rglob("*"))) == before
        return said

    return check


@pytest.fixture
def run(here, compose):
    """Makes a run's folder with a recorded configuration."""

    def make(content: bytes = b"", folder: str = "outputs/SR-001") -> Path:
        (here / folder).mkdir(parents=True, exist_ok=True)
        (here / folder / recorded.FILE).write_bytes(content or recorded.written(compose()).encode())
        (here / folder / "result.json").write_text("{}")
        return here / folder

    return make


@pytest.mark.parametrize(
    "content", [*map(foreign, (*FOREIGN.values(), *FORMS.values())), b"\xff\xfe\x00"], ids=[*FOREIGN, *FORMS, "bytes"]
)
def test_what_is_not_ours_is_refused_by_name(run, refused, content):
    run(content or b"\n")
    said = refused("--config-path", "outputs/SR-001", "run.resume=SR-001")
    assert "config_resolved" in said
    with pytest.raises(ConfigError):
        recorded.read(Path("outputs/SR-001") / recorded.FILE)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("callbacks", "holds hydra"), ("environment", "run.notes=${oc.env:HOME}"), ("defaults", "holds defaults")],
)
def test_the_name_is_told(run, refused, name, hint):
    run(foreign(FOREIGN[name]))
    assert hint in refused("--config-path", "SR-001", "run.resume=SR-001")


@pytest.mark.parametrize(
    "words",
    [
        ["--config-path", "outputs/SR-001", "--config-name", "mine"],
        ["--config-path", "outputs/SR-001/.hydra"],
        ["--config-path", "outputs/SR-001/.hydra", "--config-name", "config"],
        ["--config-path", "link", "--config-name", "mine"],
        ["--config-dir", "outputs/SR-001"],
        ["--config-dir", "outputs/artifacts/checkpoints/q4"],
        ["--config-dir", "outputs/sweep-001"],
        ["--config-dir", "link/.hydra"],
        ["--config-name", "{up}/outputs/SR-001/config"],
        ["--config-path", "file://{here}/outputs/SR-001", "--config-name", "mine"],
        ["hydra.searchpath=[file://{here}/outputs/SR-001]", "hydra/launcher=mine"],
        ["hydra.searchpath=['{here}/link']", "hydra/launcher=mine"],
        ["--config-path", "own", "--config-name", "linked"],
        ["--config-path", "own", "--config-name", "including"],
    ],
)
def test_options_are_read_from_ones_own_folders_alone(run, refused, here, words):
    folder = run()
    evil = yaml.safe_dump({"defaults": ["schema"], **FOREIGN["callbacks"]})
    for place in ("outputs/SR-001", "outputs/SR-001/.hydra", "outputs/artifacts/checkpoints/q4", "outputs/sweep-001"):
        (here / place / "hydra" / "launcher").mkdir(parents=True)
        (here / place / "hydra" / "launcher" / "mine.yaml").write_text(yaml.safe_dump(TARGET))
        for name in ("config", "mine"):
            (here / place / f"{name}.yaml").write_text(evil)
    (here / "outputs" / "sweep-001" / "sweep.json").write_text("{}")
    (here / "link").symlink_to(folder, target_is_directory=True)
    (here / "own").mkdir()
    (here / "own" / "linked.yaml").symlink_to(folder / "mine.yaml")
    (here / "own" / "including.yaml").write_text("defaults: [schema, ../outputs/SR-001/mine]\n")
    up = os.path.relpath(here, trusted.CONF)
    said = refused(*(word.format(here=here, up=up) for word in words))
    assert "which is data" in said or "/.hydra/config_resolved.yaml is not there" in said


def test_a_configuration_in_the_folder_of_a_run_is_not_the_one_that_is_read(run, here, compose):
    folder = run()
    (folder / "config.yaml").write_text(yaml.safe_dump(FOREIGN["callbacks"]))
    (folder / "hydra" / "job_logging").mkdir(parents=True)
    (folder / "hydra" / "job_logging" / "qat.yaml").write_text("handlers: {x: {(): os.system}}\n")
    (folder / "schema.yaml").write_text(yaml.safe_dump(FOREIGN["callbacks"]))
    command = arguments.parse(["--config-path", "outputs/SR-001", "quant=q4a4"])
    assert not any(str(folder) in word for word in command.argv())
    config = main.check(command).configs[0]
    assert config.quant.name == "q4a4"


def test_ones_own_options_are_still_ones_own(compose, here):
    (here / "own" / "quant").mkdir(parents=True)
    (here / "own" / "quant" / "mine.yaml").write_text("mlp: {bits: 2, rank: 16}\nattn: null\n")
    assert compose("--config-dir", "own", "quant=mine", "mode=mlp").quant.mlp.rank == 16


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.text(st.sampled_from("\\$\\{}ab:."), max_size=8) | st.sampled_from([r"\${a}", r"\\${a}", "${a}\\"]))
def test_words_that_look_like_references_are_words(tmp_path, text):
    file = tmp_path / recorded.FILE
    file.write_text(recorded.written(Config(run=RunConfig(goal=text))))
    assert recorded.read(file)["run"]["goal"] == text
    assert OmegaConf.create({"a": references.escaped(text)}).a == text
    assert not references.is_live(references.escaped(text))


def test_layers_by_patterns_are_read_and_go_with_another_option(run, compose):
    made = run(recorded.written(compose("quant=mb66", "quant.layers={*.0.self_attn.q_proj: null}")).encode())
    again = ["--config-path", str(made), "--config-name", "config_resolved"]
    option = compose("quant=mb66").quant.layers
    assert option and compose(*again).quant.layers == option | {"*.0.self_attn.q_proj": None}
    assert not compose(*again, "quant=q2a4").quant.layers
    assert compose(*again, "quant=mb66").quant.layers == option


@pytest.mark.parametrize("format", ["table", "codebook", "grid", ["table"], None])
def test_a_format_that_had_another_name_then_is_read(tmp_path, format):
    file = tmp_path / recorded.FILE
    file.write_text(yaml.safe_dump({"quant": {"name": "q2", "mlp": {"bits": 2, "format": format}, "attn": None}}))
    assert recorded.read(file)["quant"]["mlp"]["format"] == ("codebook" if format == "table" else format)


def planned(folder: Path, **changes) -> None:
    job = {"run_id": "SR-001", "overrides": ["train.lr=1"], "key": "k"} | changes.pop("job", {})
    plan = {"command": "c", "flags": {}, "outputs": None, "jobs": [job]} | changes
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"job": {"overrides": ["hydra.callbacks.x={_target_:os.system}"]}}, "hydra.callbacks"),
        ({"job": {"overrides": ["+hydra/launcher=joblib"]}}, "hydra/launcher"),
        ({"job": {"overrides": ["~train"]}}, "~train"),
        ({"job": {"overrides": ["run.notes=${oc.env:HOME}"]}}, "oc.env"),
        ({"job": {"overrides": ["quant=../../outputs/x"]}}, "quant=../"),
        ({"job": {"overrides": ["+quant@hydra.callbacks=q2a4"]}}, "hydra.callbacks"),
        ({"job": {"run_id": "../../x"}}, "run_id"),
        ({"job": {"run_id": 7}}, "run_id"),
        ({"job": {"overrides": "train.lr=1"}}, "overrides"),
        ({"flags": {"config_dir": "/tmp"}}, "options of your own"),
        ({"flags": {"config_path": "/tmp", "config_name": "x"}}, "options of your own"),
        ({"flags": {"experimental_rerun": "x"}}, "flags"),
        ({"flags": []}, "flags"),
        ({"jobs": {}}, "jobs"),
        ({"jobs": []}, "jobs"),
        ({"outputs": 3}, "outputs"),
    ],
)
def test_a_plan_is_data_too(refused, here, changes, hint):
    planned(here / "outputs" / "sweep-001", **changes)
    assert hint in refused("sweep.resume=sweep-001")


def test_a_sweep_is_not_planned_with_what_its_plan_may_not_say(refused):
    assert "write it out" in refused("-m", "train.lr=1,2", "run.notes=${oc.env:HOME}")
