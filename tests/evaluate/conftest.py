"""An outputs folder with two students of the tiny model, and launches into it as a user makes them."""

import json
import sys

import pytest

from tests.launching import LAUNCH, python


@pytest.fixture(scope="module")
def outputs(teacher, cache, tmp_path_factory):
    from tests import tiny

    folder = tmp_path_factory.mktemp("stage") / "outputs"
    tiny.checkpoint_in(folder / "SR-001" / "checkpoints" / "best", teacher, cache)
    tiny.checkpoint_in(folder / "other", teacher, cache)
    return folder


@pytest.fixture(scope="module")
def command(outputs):
    """The words of a launch of the tiny job."""
    tiny = ["+debug=tiny", "instance.precision=fp32", f"outputs={outputs}"]
    return lambda *words: [sys.executable, LAUNCH, *tiny, *words]


@pytest.fixture
def launch(command, outputs, monkeypatch):
    """Runs the tiny job in a process of its own; returns it, and the record that it left."""

    def run(*words, code=0):
        before = set(outputs.glob("SR-*"))
        monkeypatch.chdir(outputs.parent)
        done = python(*command(*words)[1:])
        assert done.returncode == code, done.stderr
        new = set(outputs.glob("SR-*")) - before
        return done, json.loads((new.pop() / "result.json").read_text()) if new else None

    return run
