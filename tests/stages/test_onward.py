"""The command that goes on with a run is one that finds it, and its text where that is trained on."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qat.cli import arguments, main
from qat.shown import near
from qat.stages.onward import onward
from qat.stages.workspace import ahead


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], "stage=chat checkpoint=SR-001"),
        (["model=tiny"], "stage=chat checkpoint=SR-001"),
        (["outputs=outputs of mine"], "stage=chat checkpoint=SR-001 'outputs=outputs of mine'"),
    ],
)
def test_it_says_where_the_run_is(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(folder=tmp_path / "outputs of mine" / "SR-001", result={"run_id": "SR-001"})
    config = main.check(arguments.parse(words)).configs[0]
    monkeypatch.setattr("sys.argv", ["/bin/qat"])
    assert onward(config, run, "chat") == f"qat {command}"
    trained = "--config-path 'outputs of mine/SR-001' stage=distill checkpoint=SR-001"
    assert onward(config, run, "distill") == f"qat {trained}"


def test_paths_are_written_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "a" / "b") == near("a/b") == near(Path("a/b")) == "a/b"
    assert near(tmp_path.parent / "x") == str(tmp_path.parent / "x")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate.against=[teacher,q4_fp32]"], "evaluate teacher, q4_fp32"),
        (["checkpoint=teacher"], "evaluate teacher"),
    ],
)
def test_what_is_measured_is_told_once(words, told):
    assert ahead(main.check(arguments.parse(["stage=evaluate", *words])).configs[0]) == f"smollm2_135m, {told}"
