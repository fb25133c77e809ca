"""When, where and how long something was made, over all goes at it."""

import json
import os

import pytest

from qat import provenance, system
from qat.artifacts import obtain, partial, place, read_manifest
from qat.errors import ConfigError

AT = {"device": "cpu, float32", "threads": 2}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def time(self):
            return self.now

        def strftime(self, form):
            return "2026-11-28T14:03:59+0000"

    clock = Clock()
    monkeypatch.setattr(provenance, "time", clock)
    return clock


def made(tmp_path, clock, seconds, error=None, resumable=True):
    def make(folder):
        clock.now += seconds
        (folder / f"{clock.now}").touch()
        os.utime(folder / f"{clock.now}", (clock.now, clock.now))
        if error:
            raise error
        return {"kept": True}

    return obtain(tmp_path, "kind", "name", {}, make, resumable, at=AT)


def test_the_manifest_says_when_where_and_how_long(tmp_path, clock):
    artifact = made(tmp_path, clock, 138)
    expected = {"at": "2026-11-28T14:03:59+0000", "seconds": 138.0, "cores": system.cores(), **AT}
    assert {key: artifact.manifest["made"][key] for key in expected} == expected
    assert artifact.fresh and artifact.manifest["kept"]
    again = made(tmp_path, clock, 5)
    assert not again.fresh and again.manifest == artifact.manifest


def test_goes_add_up(tmp_path, clock):
    for error in (KeyboardInterrupt(), OSError("no space")):
        with pytest.raises(type(error)):
            made(tmp_path, clock, 20, error)
        clock.now += 5000
    assert made(tmp_path, clock, 2).manifest["made"]["seconds"] == 42.0
    assert list((tmp_path / "kind").glob("**/.time")) == []


def test_a_go_that_was_killed_counts_up_to_the_last_file_it_wrote(tmp_path, clock):
    scratch = partial(place(tmp_path, "kind", "name", {}))
    scratch.mkdir(parents=True)
    (scratch / provenance.NOTE).write_text(json.dumps({"seconds": 10.0, "since": 500.0}))
    (scratch / "shard").touch()
    os.utime(scratch / "shard", (530.0, 530.0))
    assert made(tmp_path, clock, 2).manifest["made"]["seconds"] == 42.0


@pytest.mark.parametrize("note", ["", "[]", '{"seconds": "x"}', '{"since": 1}'])
def test_a_damaged_note_counts_nothing(tmp_path, clock, note):
    folder = place(tmp_path, "kind", "name", {})
    partial(folder).mkdir(parents=True)
    (partial(folder) / provenance.NOTE).write_text(note)
    assert made(tmp_path, clock, 2).manifest["made"]["seconds"] == 2.0


@pytest.mark.parametrize(("error", "resumable"), [(ConfigError("no"), True), (OSError("no"), False)])
def test_what_leaves_nothing_leaves_no_time(tmp_path, clock, error, resumable):
    with pytest.raises(type(error)):
        made(tmp_path, clock, 20, error, resumable)
    assert not list((tmp_path / "kind").glob("**/.time"))
    assert made(tmp_path, clock, 2).manifest["made"]["seconds"] == 2.0


def test_words(tmp_path, clock):
    manifest = read_manifest(made(tmp_path, clock, 138).folder)["made"]
    told = provenance.told(manifest | {"cores": 2})
    assert told == "made 2026-11-28 14:03 in 2 min 18 s on cpu, float32, 2 cores"
    assert provenance.told(None) == provenance.told({}) == "made before that was recorded"
