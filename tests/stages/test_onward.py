"""The command that goes on with a run is one that finds it, and its model."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qat.cli import arguments, main
from qat.shown import near
from qat.stages.onward import onward


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], "stage=chat checkpoint=SR-001"),
        (["model=tiny"], "--config-path 'outputs of mine/SR-001' stage=chat checkpoint=SR-001"),
        (["outputs=outputs of mine"], "--config-path 'outputs of mine/SR-001' stage=chat checkpoint=SR-001"),
    ],
)
def test_it_names_the_configuration_where_the_defaults_are_others(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(folder=tmp_path / "outputs of mine" / "SR-001", result={"run_id": "SR-001"})
    config = main.check(arguments.parse(words)).configs[0]
    monkeypatch.setattr("sys.argv", ["/bin/qat"])
    assert onward(config, run, "chat") == f"qat {command}"


def test_paths_are_written_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "a" / "b") == near("a/b") == near(Path("a/b")) == "a/b"
    assert near(tmp_path.parent / "x") == str(tmp_path.parent / "x")
