"""A V2 state dict or its folder is a checkpoint to the command line, found without torch."""

import json
from dataclasses import replace

import pytest

from qat import plans
from qat.cli import arguments, main, recorded, registered
from qat.config import ModelConfig, ModelSource, as_plain
from qat.errors import ConfigError


@pytest.fixture
def state_dict(here):
    file = here / "old" / "best_state_dict.pt"
    file.parent.mkdir()
    file.write_bytes(b"not opened here")
    return file


@pytest.mark.parametrize("stage", ["distill", "evaluate", "chat"])
@pytest.mark.parametrize("path", ["old", "old/best_state_dict.pt"])
def test_a_v2_checkpoint_passes(state_dict, compose, stage, path):
    config = compose(f"stage={stage}", f"checkpoint={path}", "mode=e2e", "quant=q2a16")
    registered.check(config)
    assert (config.checkpoint.name, config.checkpoint.path) == ("local", path)


def test_in_a_process_without_torch(state_dict, launch_alone):
    done = launch_alone("stage=evaluate", "checkpoint=old/best_state_dict.pt")
    assert (done.code, done.err, done.heavy) == (0, "", [])


@pytest.mark.parametrize(
    ("path", "says"),
    [("several", "several state dicts (a.pt, b.pt)"), ("several/notes.txt", "name a checkpoint folder or a V2 state")],
)
def test_what_is_none_is_told(here, path, says):
    (here / "several").mkdir()
    for name in ("a.pt", "b.pt", "notes.txt"):
        (here / "several" / name).touch()
    with pytest.raises(ConfigError) as refused:
        main.check(arguments.parse(["stage=evaluate", f"checkpoint={path}"]))
    assert says in str(refused.value)


@pytest.fixture
def student(here, checkpoint, compose):
    """Leaves the run of a student of a folder's model."""

    def leave(run_id="SR-001", **parts):
        (here / "my-model").mkdir(exist_ok=True)
        (here / "my-model" / "config.json").write_text('{"model_type": "llama"}')
        (here / "my-model" / "model.safetensors").touch()
        own = ModelConfig(name="local", source=ModelSource.folder, path="my-model")
        config = replace(compose(), **{"model": own, **parts})
        checkpoint(f"outputs/{run_id}/checkpoints/best")
        folder = here / "outputs" / run_id
        (folder / "config_resolved.yaml").write_text(recorded.written(config))
        result = {"run_id": run_id, "status": "complete", "config": as_plain(config)}
        (folder / "result.json").write_text(json.dumps(result))
        return config

    return leave


QWEN = ModelConfig("qwen3", ModelSource.hub, None, "Qwen/Qwen3-0.6B", "main", None, 151936)


@pytest.mark.parametrize("words", [["stage=chat", "model=tiny"], ["stage=distill", "model=smollm2_135m"]])
def test_a_student_of_another_model_is_refused_before_any_is_made(student, compose, words):
    student()
    told = "outputs/SR-001 is a student of my-model, not of model=.*: leave the model out, and that run's own is taken"
    with pytest.raises(ConfigError, match=told):
        compose(*words, "checkpoint=SR-001")


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["stage=run"], True),
        (["stage=distill"], True),
        (["stage=convert"], True),
        (["stage=evaluate"], True),
        (["stage=chat", "chat.teacher=true"], True),
        (["stage=chat"], False),
        (["stage=export", "export.output=there"], False),
    ],
)
@pytest.mark.parametrize("name", ["SR-001", "outputs/SR-001/checkpoints/best"])
def test_a_student_comes_with_the_model_and_teacher_of_its_run(student, compose, words, asks, name):
    theirs = student(teacher=QWEN)
    found = compose(*words, f"checkpoint={name}")
    assert (found.model, found.teacher) == (theirs.model, QWEN if asks else None)
    assert found.data == compose().data  # nothing else of that run


def test_students_of_several_teachers_need_one_named(student, compose):
    student(teacher=QWEN), student("SR-002")
    words = ["stage=evaluate", "checkpoint=SR-001", "evaluate.against=[SR-002]"]
    with pytest.raises(ConfigError, match=r"SR-001 was taught by .* and SR-002 by its own model: say teacher=<option>"):
        compose(*words)
    assert compose(*words, "teacher=local", "teacher.path=my-model").teacher.path == "my-model"


def test_a_teacher_that_is_named_stays(student, compose):
    student(teacher=QWEN)
    found = compose("stage=evaluate", "checkpoint=SR-001", "teacher=local", "teacher.path=my-model")
    assert found.teacher.path == "my-model" and found.model.path == "my-model"


def test_every_model_that_is_compared_says_whose_student_it_is(student, compose):
    student(model=QWEN), student("SR-002", model=QWEN), student("SR-003")
    assert compose("stage=evaluate", "evaluate.against=[SR-001,SR-002,teacher]").model == QWEN
    assert compose("stage=evaluate", "evaluate.against=[SR-001,SR-003]").model == compose().model


def test_each_job_of_a_sweep_has_the_model_of_its_own_student(student, here):
    student(model=QWEN, teacher=replace(QWEN, name="larger")), student("SR-002"), student("SR-003", model=QWEN)
    checked = main.check(arguments.parse(["-m", "stage=evaluate", "checkpoint=SR-001,SR-002,SR-003"]))
    assert [config.model.name for config in checked.configs] == ["qwen3", "local", "qwen3"]
    assert [config.teacher and config.teacher.name for config in checked.configs] == ["larger", None, None]
    assert not any(map(plans.foreign, checked.jobs))  # so a plan keeps them


def test_presets_and_recorded_runs_name_a_model(student, compose):
    student()
    with pytest.raises(ConfigError, match="is a student of my-model, not of model=tiny"):
        compose("+debug=tiny", "stage=chat", "checkpoint=SR-001")
    student("SR-002", model=QWEN)
    with pytest.raises(ConfigError, match="is a student of my-model, not of model=qwen3"):
        compose("--config-path", "outputs/SR-002", "stage=chat", "checkpoint=SR-001")


@pytest.mark.parametrize("name", ["a'b\\", "${oc.env:HOME}", r"\${oc.env:HOME}", "[1, {x: y}]", "null", "1e3"])
def test_a_model_is_taken_as_it_is_written(student, compose, name):
    theirs = student(model=replace(QWEN, name=name, repo=name), teacher=replace(QWEN, name=name, revision=name))
    found = compose("stage=distill", "checkpoint=SR-001")
    assert (found.model, found.teacher) == (theirs.model, theirs.teacher)


def test_folders_are_left_to_whoever_opens_them(student, compose, here):
    student()
    (here / "my-model").rename(here / "moved")
    assert compose("stage=chat", "checkpoint=SR-001", "model=local", "model.path=moved").model.path == "moved"
    with pytest.raises(ConfigError, match="my-model"):
        compose("stage=chat", "checkpoint=SR-001")
