"""Scratch is swept when it is nobody's, and only then; a folder is replaced with no moment in which both are gone."""

import os
import time

import pytest

from qat import identities, scratch, sweeps, system
from tests.killing import killed

ELSEWHERE = "00000000"


def leftover(parent, target, host=scratch.HOST):
    """As a killed process leaves it."""
    made = parent / f".{target}.{host}-abcd_123.scratch"
    made.mkdir(parents=True)
    (made / "half").write_text("half")
    return made


@pytest.mark.parametrize("make", [scratch.folder, scratch.file])
def test_scratch_lies_beside_its_place_and_is_gone_at_the_end(tmp_path, make):
    with make(tmp_path / "x") as made:
        assert made.parent == tmp_path and made.name.startswith(".x.") and made.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "x") as made:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [scratch.folder, scratch.file])
def test_what_somebody_fills_is_not_swept(tmp_path, make):
    with make(tmp_path / "x") as made:
        scratch.sweep(tmp_path)
        with make(tmp_path / "x") as other:
            assert made.exists() and other.exists() and made != other
        assert made.exists()


def test_what_nobody_fills_is_swept_by_whoever_makes_the_same(tmp_path):
    lost = leftover(tmp_path, "x")
    with scratch.folder(tmp_path / "x"):
        assert not lost.exists()


def test_a_name_that_begins_alike_is_another(tmp_path):
    other = leftover(tmp_path, "q4.v2")
    with scratch.folder(tmp_path / "q4"):
        assert other.exists()
    scratch.sweep(tmp_path, "q4.v2")
    assert not other.exists()


def test_what_another_host_makes_is_nobodys_after_a_day(tmp_path):
    made = leftover(tmp_path, "x", ELSEWHERE)
    scratch.sweep(tmp_path)
    assert made.exists()
    before = time.time() - scratch.ABANDONED_SECONDS - 60
    os.utime(made, (before, before))
    scratch.sweep(tmp_path)
    assert made.exists()  # a file in it is fresh
    os.utime(made / "half", (before, before))
    scratch.sweep(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize("name", [".x.scratch", ".x.zzzzzzzz-abcd_123.scratch", "x.00000000-abcd_123.scratch"])
def test_other_files_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    scratch.sweep(tmp_path)
    assert (tmp_path / name).exists()


def old_and_new(folder):
    """A folder in its place, and what is to replace it."""
    for name in ("old", "new"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{name}{number}").write_text(name)
    return folder / "old", folder / "new"


def content(place):
    return {path.name for path in place.iterdir()} if place.exists() else None


WHOLE = ({"old0", "old1", "old2"}, {"new0", "new1", "new2"})


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_whole_whenever_the_process_is_killed(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(system, "exchange", lambda *_: False)
    number, seen = 0, []
    going = True
    while going:
        number += 1
        folder = tmp_path / str(number)
        place, new = old_and_new(folder)

        def replace(place=place, new=new):
            with scratch.folder(place) as made:
                os.rename(new, made / "content")
                scratch.replace_folder(made / "content", place)

        going = killed(replace, [folder], number, tmp_path)
        if exchanges:
            assert content(place) in WHOLE  # at any moment
        scratch.sweep(folder)
        assert content(place) in WHOLE
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        seen.append(content(place))
    assert number > 5 and seen[0] == WHOLE[0] and seen[-1] == WHOLE[1]


def test_a_replacement_that_fails_puts_the_older_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "exchange", lambda *_: False)
    place, _ = old_and_new(tmp_path)
    with pytest.raises(FileNotFoundError):
        scratch.replace_folder(tmp_path / "not there", place)
    assert content(place) == WHOLE[0] and len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_removed_whole_whenever_the_process_is_killed(tmp_path):
    number, going = 0, True
    while going:
        number += 1
        place, _ = old_and_new(tmp_path / str(number))
        going = killed(lambda place=place: scratch.discard(place), [place.parent], number, tmp_path)
        assert content(place) in (WHOLE[0], None)
        scratch.sweep(place.parent)
        assert content(place) in (WHOLE[0], None) and not list(place.parent.glob(".*"))
    assert number > 5


def test_all_places_of_an_outputs_folder_are_swept(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "mine"
    outputs = tmp_path / "outputs"
    identities.note(outputs, "SR-004", elsewhere)
    places = [
        ".",
        "artifacts/caches",
        "checkpoints",
        "caches",
        ".ids/SR-001",
        "SR-001",
        "SR-001/checkpoints",
        "sweep-001",
        "sweep-001/SR-002",
        "sweep-001/SR-002/checkpoints",
    ]
    lost = [leftover(outputs / place, "x") for place in places] + [leftover(elsewhere / "checkpoints", "best")]
    (outputs / "mine").mkdir()
    kept = leftover(outputs / "mine", "x")  # a folder that is none of ours
    identities.sweep(outputs)
    assert not [path for path in lost if path.exists()] and kept.exists()


def test_an_empty_sweep_is_swept_unless_somebody_is_planning_it(tmp_path):
    empty, planned = (identities.claim_sweep(tmp_path) for _ in range(2))
    with scratch.locked(planned):
        identities.sweep(tmp_path)
    assert not empty.exists() and planned.exists()
    sweep = sweeps.create(None, tmp_path, "", {}, {"key": ["seed=1"]})
    identities.sweep(tmp_path)
    assert sweeps.load(sweep.folder).jobs == sweep.jobs
