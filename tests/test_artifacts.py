"""Results on disk: keyed by what shaped them, published whole or not at all, checked when opened."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat import artifacts, faults
from qat.artifacts import (
    content_key,
    obtain,
    open_artifact,
    publish,
    read_manifest,
    require_space,
    write_json,
    write_text,
)
from qat.errors import ArtifactError, ConfigError, MissingError

ROOT = Path(__file__).resolve().parents[1]

# A process that makes one artifact in two steps, with a pause until there is a file, and leaves a line in `made` for
# each time it does.
MAKER = """
import logging, os, pathlib, sys, time
from qat.artifacts import obtain
root, awaited = map(pathlib.Path, sys.argv[1:])
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

def make(folder):
    with open(root / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    (folder / "first").write_text("1")
    while not awaited.exists():
        time.sleep(0.005)
    (folder / "second").write_text("2")
    return {"maker": os.getpid()}

print(obtain(root, "kind", "name", {"a": 1}, make).manifest["maker"], flush=True)
"""

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.dictionaries(st.text(max_size=3), leaves | st.dictionaries(st.text(max_size=3), leaves, max_size=3))


def start(root, awaited):
    command = [sys.executable, "-c", MAKER, str(root), str(awaited)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(path_exists, seconds=20.0):
    end = time.monotonic() + seconds
    while not path_exists():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def fill(folder):
    (folder / "a.txt").write_text("alpha")
    (folder / "b.bin").write_bytes(bytes(1000))
    return {"note": "made"}


@pytest.fixture
def made(tmp_path):
    return obtain(tmp_path, "kind", "name", {"x": 1}, fill).folder


def reverse(tree):
    return {key: reverse(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


@given(trees)
def test_key_does_not_see_the_order_of_keys(tree):
    assert content_key(reverse(tree)) == content_key(tree)


@given(trees, trees)
def test_key_tells_values_apart(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (content_key(one) == content_key(other)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": 2}), ({"a": 1}, {"a": "1"}), ({"a": None}, {}), ({"a": [1, 2]}, {"a": [2, 1]})],
)
def test_key_sees_small_differences(one, other):
    assert content_key(one) != content_key(other)


def test_key_is_twelve_digits_of_the_sha256_of_canonical_json():
    assert content_key({"b": [1, None], "a": "ü"}) == hashlib.sha256(b'{"a":"\\u00fc","b":[1,null]}').hexdigest()[:12]


def test_artifact_lies_under_its_kind_name_and_key(made, tmp_path):
    assert made == tmp_path / "kind" / f"name-{content_key({'x': 1})}"


def test_manifest_lists_every_file_with_size_and_digest(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["inputs"] == {"x": 1}
    assert (manifest["kind"], manifest["name"], manifest["note"]) == ("kind", "name", "made")
    assert manifest["files"] == {
        "a.txt": {"bytes": 5, "sha256": hashlib.sha256(b"alpha").hexdigest()},
        "b.bin": {"bytes": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()},
    }


def test_files_in_subfolders_are_listed_and_checked(tmp_path):
    def deep(folder):
        (folder / "in" / "side").mkdir(parents=True)
        (folder / "in" / "side" / "c").write_text("deep")
        return {}

    folder = obtain(tmp_path, "kind", "deep", {}, deep).folder
    assert list(read_manifest(folder)["files"]) == ["in/side/c"]
    (folder / "in" / "side" / "c").write_text("peed")
    with pytest.raises(ArtifactError, match=re.escape(f"delete {folder} and run again")):
        open_artifact(folder)


def test_second_request_makes_nothing(made, tmp_path):
    def never(folder):
        raise AssertionError("made twice")

    assert obtain(tmp_path, "kind", "name", {"x": 1}, never).folder == made


def test_other_inputs_make_another_artifact(made, tmp_path):
    assert obtain(tmp_path, "kind", "name", {"x": 2}, fill).folder != made


def test_target_appears_only_after_the_last_file(tmp_path):
    target = tmp_path / "there"
    with publish(target, {}) as (scratch, _):
        (scratch / "a").write_text("x")
        assert not target.exists()
        assert scratch.parent == tmp_path  # the same file system, or the rename would copy
    assert (target / "a").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_exception_while_making_leaves_no_trace(tmp_path, raised):
    def fail(folder):
        (folder / "half").write_text("x")
        raise raised

    with pytest.raises(raised):
        obtain(tmp_path, "kind", "name", {}, fail)
    assert [path for path in (tmp_path / "kind").iterdir() if not path.name.endswith(".lock")] == []


def test_failed_replacement_keeps_the_older_folder(tmp_path):
    target = tmp_path / "best"
    with publish(target, {}) as (scratch, _):
        (scratch / "a").write_text("old")
    with pytest.raises(ValueError), publish(target, {}) as (scratch, _):
        (scratch / "a").write_text("new")
        raise ValueError
    open_artifact(target)
    assert (target / "a").read_text() == "old"


def test_replacement_leaves_nothing_of_the_older_folder(tmp_path):
    target = tmp_path / "best"
    for name in ("old", "new"):
        with publish(target, {}) as (scratch, _):
            (scratch / name).write_text(name)
    open_artifact(target)
    assert {path.name for path in target.iterdir()} == {"new", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_published_artifact_can_be_read_by_others(tmp_path):
    def private(folder):
        (folder / "a").touch(mode=0o600)
        return {}

    folder = obtain(tmp_path, "kind", "name", {}, private).folder
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_truncated_file_is_refused_by_name(made):
    (made / "b.bin").write_bytes(bytes(999))
    with pytest.raises(
        ArtifactError, match=re.escape(f"{made / 'b.bin'} has 999 bytes instead of 1000: delete {made}")
    ):
        open_artifact(made)


def test_altered_byte_is_refused_by_name(made):
    (made / "b.bin").write_bytes(bytes(500) + b"\x01" + bytes(499))
    with pytest.raises(ArtifactError, match=re.escape(f"{made / 'b.bin'} was altered")):
        open_artifact(made)


def test_missing_file_is_refused_by_name(made):
    (made / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{made / 'a.txt'} is missing: delete {made}")):
        open_artifact(made)


def test_missing_manifest_is_refused_by_name(made):
    (made / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{made} holds no manifest.json")):
        open_artifact(made)


@pytest.mark.parametrize("text", ["", '{"files": {', "[]", "{}", '{"files": 3}', "\x00"])
def test_unreadable_manifest_is_refused_by_name(made, text):
    (made / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(str(made / "manifest.json"))):
        open_artifact(made)


def test_damaged_artifact_is_refused_and_not_made_again(made, tmp_path):
    (made / "a.txt").write_text("omega")
    with pytest.raises(ArtifactError, match="altered"):
        obtain(tmp_path, "kind", "name", {"x": 1}, fill)


def test_two_processes_at_once_make_it_once(tmp_path):
    first = start(tmp_path, tmp_path / "go")
    wait_for((tmp_path / "made").exists)
    second = start(tmp_path, tmp_path / "go")
    said = second.stdout.readline()
    assert said.startswith("waiting: another process is making") and f"(process {first.pid}, since " in said
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=30)[0].splitlines() for process in (first, second)]
    assert outputs == [[str(first.pid)]] * 2
    assert (tmp_path / "made").read_text().split() == [str(first.pid)]


def test_killed_maker_blocks_nobody_and_its_leftovers_are_swept(tmp_path):
    first = start(tmp_path, tmp_path / "never")
    wait_for(lambda: list(tmp_path.glob("kind/.name-*.scratch/first")))
    second = start(tmp_path, tmp_path)
    assert second.stdout.readline().startswith("waiting")
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=30)[0].strip() == str(second.pid)
    first.communicate()
    assert (tmp_path / "made").read_text().split() == [str(first.pid), str(second.pid)]
    assert list(tmp_path.glob("kind/.*.scratch")) == []
    (folder,) = tmp_path.glob("kind/name-*")
    assert set(open_artifact(folder).manifest["files"]) == {"first", "second"}


def test_json_file_is_readable_text(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, "é"]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'


def test_unwritable_value_keeps_the_older_json(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == 1


def test_failed_write_keeps_the_older_text_and_leaves_no_scratch(tmp_path, monkeypatch):
    def full(handle):
        raise OSError("no space left")

    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_text_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    happened = []
    replace, sync = artifacts.os.replace, artifacts.os.fsync
    monkeypatch.setattr(artifacts.os, "fsync", lambda handle: (happened.append("flushed"), sync(handle)))
    monkeypatch.setattr(artifacts.os, "replace", lambda *names: (happened.append("renamed"), replace(*names)))
    write_text(tmp_path / "x", "new")
    assert happened == ["flushed", "renamed"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def settle(folder):
    """Makes the files of an artifact look as if they were written an hour ago."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def test_unchanged_files_are_hashed_once(made, monkeypatch):
    settle(made)
    open_artifact(made)
    monkeypatch.setattr(artifacts, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
    open_artifact(made)


def test_what_lies_on_a_full_disk_can_be_read(made, monkeypatch):
    def full(path, *rest):
        with faults.located(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    settle(made)
    monkeypatch.setattr(artifacts, "write_json", full)
    open_artifact(made)


def test_fresh_files_are_not_trusted(made):
    open_artifact(made)
    assert [path for path in made.parent.iterdir() if path.suffix == ".checked"] == []


def test_a_file_altered_after_it_was_checked_is_refused(made):
    settle(made)
    open_artifact(made)
    (made / "b.bin").write_bytes(bytes(500) + b"\x01" + bytes(499))
    with pytest.raises(ArtifactError, match="altered"):
        open_artifact(made)


def test_a_file_put_in_anothers_place_is_refused(made, tmp_path):
    """Of the same size and time, but another inode."""
    settle(made)
    open_artifact(made)
    other = tmp_path / "other"
    other.write_bytes(bytes(999) + b"\x01")
    shutil.copystat(made / "b.bin", other)
    os.replace(other, made / "b.bin")
    with pytest.raises(ArtifactError, match="altered"):
        open_artifact(made)


@pytest.mark.parametrize("note", ["", "[]", "{", '{"a.txt": [1]}', '{"a.txt": []}'])
def test_a_damaged_note_is_no_note(made, note):
    settle(made)
    (made.parent / f".{made.name}.checked").write_text(note)
    assert open_artifact(made).folder == made


def test_resumable_artifact_goes_on_where_it_was(tmp_path):
    def fail(folder):
        (folder / "first").write_text("1")
        raise OSError("no space left")

    def finish(folder):
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")
        return {}

    with pytest.raises(OSError):
        obtain(tmp_path, "kind", "name", {}, fail, resumable=True)
    folder = obtain(tmp_path, "kind", "name", {}, finish, resumable=True).folder
    assert set(read_manifest(folder)["files"]) == {"first", "second"}
    assert list((tmp_path / "kind").glob(".*.partial")) == []


def test_resumable_artifact_of_a_wrong_configuration_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "first").write_text("1")
        raise ConfigError("too little")

    with pytest.raises(ConfigError):
        obtain(tmp_path, "kind", "name", {}, fail, resumable=True)
    assert list((tmp_path / "kind").glob(".*.partial")) == []


def test_disk_that_is_too_small_is_told_in_numbers(tmp_path):
    require_space(tmp_path / "not" / "there", 1, "a small thing")
    with pytest.raises(MissingError, match=r"a large thing needs 1,000,000,000 GB in .* are free there"):
        require_space(tmp_path, 10**18, "a large thing")
