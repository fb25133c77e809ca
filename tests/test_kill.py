"""`kill -9` at any moment: nothing half-made that looks finished, an honest record, a next run that goes through.

What makes files is killed before each of its operations, in processes that are forked here; a whole run before
one, drawn with a seed. `benchmarks/kills.py` does that to every command and every operation.
"""

import itertools
import json
import random

import pytest
import torch
from safetensors.torch import save_file

from qat import scratch
from qat.artifacts import obtain, open_artifact, publish, write_json
from qat.distill.state import State, States
from tests import kills
from tests.killing import killed

SAMPLE = 1  # operations of a run
FILES = {"a.safetensors", "b.txt"}

WHOSE = {"run_id": "SR-001", "started": "then"}


def fill(folder, says=1.0):
    """Two files, of which one is there already where somebody was killed."""
    if not (folder / "b.txt").exists():
        (folder / "half").write_text("b")
        (folder / "half").rename(folder / "b.txt")
    save_file({"a": torch.full((4,), says)}, folder / "a.safetensors")
    for path in folder.glob(".tmp*"):
        path.unlink()
    return {"says": says}


def each(tmp_path, work, least):
    """Kills some work before each operation, each time in a folder of its own."""
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        yield folder, (going := killed(lambda folder=folder: work(folder), [folder], number, tmp_path))
        if not going:
            break
    assert number > least


def hidden(folder):
    return [path for path in folder.rglob(".*") if path.suffix not in (".lock", ".checked")]


@pytest.mark.parametrize("resumable", [False, True])
def test_an_artifact_is_made_again_whole_wherever_its_maker_was_killed(tmp_path, resumable):
    def make(folder):
        return obtain(folder, "kind", "name", {}, fill, resumable)

    for folder, _ in each(tmp_path, make, 15):
        found = [path for path in folder.glob("kind/*") if not path.name.startswith(".")]
        assert all(set(open_artifact(path).manifest["files"]) == FILES for path in found)
        made = make(folder)
        listed = {path.name for path in made.folder.iterdir()} - {"manifest.json"}
        assert set(made.manifest["files"]) == listed == FILES
        scratch.sweep(folder / "kind")
        assert hidden(folder) == []


def test_a_checkpoint_is_the_older_or_the_newer_one_wherever_its_writer_is_killed(tmp_path):
    def save(folder, says):
        with publish(folder / "best", {}) as (made, manifest):
            manifest.update(fill(made, says))

    seen = []

    def replace(folder):
        save(folder, 2.0)

    for number in itertools.count(1):
        folder = tmp_path / str(number)
        save(folder, 1.0)
        going = killed(lambda folder=folder: replace(folder), [folder], number, tmp_path)
        seen.append(open_artifact(folder / "best").manifest["says"])
        replace(folder)
        assert open_artifact(folder / "best").manifest["says"] == 2.0 and hidden(folder) == []
        if not going:
            break
    assert number > 15 and seen == sorted(seen) and (seen[0], seen[-1]) == (1.0, 2.0)


def test_the_newest_state_is_whole_wherever_its_writer_is_killed(tmp_path):
    def save(folder, *steps):
        states = States(folder, 1, WHOSE)
        for step in steps:
            states.save(State(step, {"step": torch.tensor(step)}, {}))
        states.wait()

    for number in itertools.count(1):
        folder = tmp_path / str(number)
        save(folder, 1)
        going = killed(lambda folder=folder: save(folder, 2), [folder], number, tmp_path)
        newest = States(folder, 1, WHOSE).newest()
        assert newest is not None and newest.tensors["step"] == newest.step in (1, 2)
        for path in folder.glob("state-*"):
            open_artifact(path)
        save(folder, 3)
        scratch.sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["state-00000003"]
        if not going:
            break
    assert number > 15


def test_a_text_is_the_older_or_the_newer_one_wherever_its_writer_is_killed(tmp_path):
    for number in itertools.count(1):
        path = tmp_path / str(number) / "x.json"
        path.parent.mkdir()
        write_json(path, 1)
        going = killed(lambda path=path: write_json(path, 2), [path.parent], number, tmp_path)
        assert json.loads(path.read_text()) in (1, 2)
        write_json(path, 3)
        assert [path.name for path in path.parent.iterdir()] == ["x.json"]
        if not going:
            break
    assert number > 3


def test_a_run_killed_anywhere_is_made_again_to_the_same_bytes(tmp_path):
    case = next(case for case in kills.cases() if case.name == "run")
    case.prepare(tmp_path / "base")
    operations, expected = kills.undisturbed(case, tmp_path / "base", tmp_path / "undisturbed")
    for number in random.Random(0).sample(range(1, len(operations) + 1), SAMPLE):
        root = tmp_path / f"killed-{number}"
        assert kills.trial(case, tmp_path / "base", root, number, expected) == [], operations[number - 1]
