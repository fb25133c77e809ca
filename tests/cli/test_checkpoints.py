"""A V2 state dict or its folder is a checkpoint to the command line, found without torch."""

import json

import pytest

from qat.cli import arguments, main, registered
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
def student(here, checkpoint):
    """The run of a student of a folder's model."""
    checkpoint("outputs/SR-001/checkpoints/best")
    model = {"name": "local", "source": "folder", "package": None, "repo": None, "path": "my-model"}
    result = {"run_id": "SR-001", "status": "complete", "config": {"model": model}}
    (here / "outputs/SR-001/result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("words", [["stage=chat"], ["stage=distill", "model=tiny"], []])
def test_a_student_of_another_model_is_refused_before_any_is_made(student, compose, words):
    told = "is a student of my-model, not of model=.*: add --config-path outputs/SR-001, which is"
    with pytest.raises(ConfigError, match=told):
        compose(*words, "checkpoint=SR-001")


def test_folders_are_left_to_whoever_opens_them(student, compose, here):
    (here / "moved").mkdir()
    (here / "moved" / "config.json").write_text('{"model_type": "llama"}')
    (here / "moved" / "model.safetensors").touch()
    assert compose("stage=chat", "checkpoint=SR-001", "model=local", "model.path=moved").model.path == "moved"
