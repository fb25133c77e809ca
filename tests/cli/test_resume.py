"""A run goes on in its own folder, and only as what it was."""

import json
import shutil

import pytest

from qat.cli import main
from tests.cli.conftest import DRIVER
from tests.launching import python


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A directory with a run to go on with."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert python("-c", DRIVER, "train.lr=0.5", "run.goal='costs ${5}'".replace("$", "\\$")).returncode == 0
    return folder


@pytest.fixture
def interrupted(begun, here):
    """The folder of a run to go on with, in a directory of its own."""
    shutil.copytree(begun / "outputs", here / "outputs")
    return here / "outputs" / "SR-001"


def test_the_same_command_goes_on_in_the_same_folder(launch_alone, here, interrupted):
    (interrupted / "result.json").unlink()
    done = launch_alone("train.lr=0.5", "run.resume=SR-001")
    assert (done.code, done.err, done.heavy) == (0, "", [])
    assert [path.name for path in (here / "outputs").glob("SR-*")] == ["SR-001"]
    assert json.loads((interrupted / "result.json").read_text())["lr"] == 0.5


def test_its_recorded_configuration_is_enough(launch, here, interrupted):
    done = launch("--config-path", "outputs/SR-001", "run.resume=SR-001")
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in (here / "outputs").glob("SR-*")] == ["SR-001"]


@pytest.mark.parametrize("words", ["instance=cpu", "instance.micro_batch=2", "run.notes=again", "train.save_every=7"])
def test_what_shapes_no_result_may_change(launch, here, interrupted, words):
    assert launch("train.lr=0.5", "run.resume=SR-001", words).code == 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train.lr=0.4"], "train.lr was 0.5 there and is 0.4 here"),
        ([], "train.lr was 0.5 there and is 0.001 here"),
        (["train.lr=0.5", "quant=q4a4"], "quant.name was q2a4 there and is q4a4 here"),
        (["train.lr=0.5", "seed=3"], "seed was 0 there and is 3 here"),
    ],
)
def test_another_configuration_is_refused_by_its_first_key(launch, here, interrupted, words, hint):
    before = (interrupted / "config_resolved.yaml").read_text()
    done = launch(*words, "run.resume=SR-001")
    assert done.code == 2 and hint in done.err and done.err.count("\n") == 1
    assert "--config-path outputs/SR-001" in done.err
    assert (interrupted / "config_resolved.yaml").read_text() == before


def test_a_run_goes_on_in_a_folder_of_its_own(launch, here):
    launch("train.lr=0.5", "hydra.run.dir=mine")
    for words in (["train.lr=0.5", "run.resume=mine/"], ["--config-path", "mine", f"run.resume={here}/mine"]):
        (here / "mine" / "result.json").unlink()
        assert launch(*words).code == 0
        assert (here / "mine" / "result.json").is_file()
    assert not (here / "outputs").exists()


def test_a_folder_is_not_called_like_another_run(interrupted, here, capfd):
    assert main.main(["train.lr=0.5", "hydra.run.dir=mine/SR-001"], lambda: pytest.fail("launched")) == 2
    assert "hydra.run.dir=mine/SR-001: SR-001 is the run in outputs/SR-001: choose another" in capfd.readouterr().err
    assert not (here / "mine").exists()


def test_the_nearest_run_is_named_and_a_sweep_is_refused(launch, here, interrupted):
    assert "did you mean SR-001" in launch("run.resume=SR-010").err
    assert "leave out -m" in launch("-m", "train.lr=0.5", "run.resume=SR-001").err


@pytest.mark.parametrize(
    ("word", "left", "told"),
    [
        ("${hydra:job.name}/../mine", {"result.json": '{"status": "complete"}', "config_resolved.yaml": ""}, "a run"),
        ("link/", {"result.json": '{"status": "failed"}', "train.log": ""}, "a run"),
        ("mine", {"result.json": "damaged"}, "a run"),
        ("mine", {"sweep.json": "{}", "summary.md": ""}, "a sweep"),
        ("mine", {"manifest.json": '{"kind": "checkpoint"}', "tables.safetensors": ""}, "manifest.json"),
        ("mine", {"notes.txt": ""}, "notes.txt"),
        ("mine", {".hidden": ""}, ".hidden"),
    ],
)
def test_a_new_run_takes_no_folder_with_something_in_it(here, capfd, word, left, told):
    (here / "mine").mkdir()
    (here / "launch").mkdir()
    (here / "link").symlink_to("mine")
    for name, text in left.items():
        (here / "mine" / name).write_text(text)
    assert main.main([f"hydra.run.dir={word}"], lambda: pytest.fail("launched")) == 2
    said = capfd.readouterr().err
    assert f"there is {told} in it already" in said and said.count("\n") == 1
    if told == "a sweep":
        assert main.main(["-m", "seed=1,2", "hydra.sweep.dir=mine"], lambda: pytest.fail("launched")) == 2
    assert {path.name: path.read_text() for path in (here / "mine").iterdir()} == left


def test_a_folder_in_which_nothing_was_begun_is_free(launch, here):
    (here / "mine" / ".hydra").mkdir(parents=True)
    (here / "mine" / "config_resolved.yaml").write_text("train: {lr: 3}\n")
    assert launch("hydra.run.dir=mine", "train.lr=0.5").code == 0
    assert json.loads((here / "mine" / "result.json").read_text())["lr"] == 0.5


def test_a_run_goes_on_nowhere_else(interrupted, here, capfd):
    (interrupted / "result.json").unlink()
    words = ["train.lr=0.5", "run.goal='costs ${5}'".replace("$", "\\$"), "run.resume=SR-001", "hydra.run.dir=else"]
    assert main.main(words, lambda: pytest.fail("launched")) == 2
    assert "SR-001 goes on in outputs/SR-001, so leave this out" in capfd.readouterr().err
