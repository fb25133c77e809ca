"""Push, pull and mirror killed before each thing that they do to files: old or new, whole, and nothing left over."""

import hashlib
import itertools
import json
import shutil

import pytest

from qat import scratch, transfer
from qat.config import StoreConfig, StoreKind
from qat.errors import ArtifactError, MachineError
from qat.store import names
from qat.store.places import Place
from tests.killing import killed
from tests.test_faults import small_disk  # noqa: F401 - a fixture

OLD, NEW = "the older tables", "the newer tables"


def made(folder, says):
    """A checkpoint's folder with something in it."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "tables").write_text(says)
    return folder


def pulled(drive, outputs, kind="checkpoints", name="mine"):
    """What the store has, as a command would see it."""
    shutil.rmtree(outputs, ignore_errors=True)
    place = Place(str(drive))
    entries = place.entries()
    found = names.find(entries, [name])
    return found and transfer.pull(place, entries, found, outputs, kind)


def hidden(*folders):
    return [path for folder in folders for path in folder.rglob(".*") if path.suffix != ".lock"]


@pytest.mark.parametrize(("there", "step"), [("an archive", 1), ("an archive without a checksum", 3), ("nothing", 3)])
def test_killed_push_leaves_the_older_archive_or_the_newer_one(tmp_path, there, step):
    old, new = made(tmp_path / "old", OLD), made(tmp_path / "new", NEW)
    seen = []
    for number in itertools.count(1, step):
        drive, home = tmp_path / f"drive{number}", tmp_path / f"home{number}"
        drive.mkdir(), home.mkdir()
        if there != "nothing":
            transfer.push(Place(str(drive)), old, "checkpoints", "mine")
        if there == "an archive without a checksum":
            (drive / "checkpoints" / "mine.tgz.sha256").unlink()

        def push(drive=drive):
            transfer.push(Place(str(drive)), new, "checkpoints", "mine")

        going = killed(push, [drive, home], number, home)
        folder = pulled(drive, tmp_path / "outputs")
        seen.append((folder / "tables").read_text() if folder else None)
        assert not killed(push, [drive, home], 0, home)
        assert (pulled(drive, tmp_path / "outputs") / "tables").read_text() == NEW
        assert [*home.iterdir(), *hidden(drive)] == []
        digest = hashlib.sha256((drive / "checkpoints" / "mine.tgz").read_bytes()).hexdigest()
        assert (drive / "checkpoints" / "mine.tgz.sha256").read_text() == f"{digest}  mine.tgz\n"
        if not going:
            break
    first = None if there == "nothing" else OLD
    assert number > 10 and (seen[0], seen[-1]) == (first, NEW)
    assert seen == sorted(seen, key=seen.index) and set(seen) == {first, NEW}


def test_an_archive_that_is_neither_of_two_is_still_refused(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    place = Place(str(drive))
    transfer.push(place, made(tmp_path / "old", OLD), "checkpoints", "mine")
    listed = drive / "checkpoints" / "mine.tgz.sha256"
    listed.write_text(listed.read_text() + f"{hashlib.sha256(b'').hexdigest()}  mine.tgz\n")
    pulled(drive, tmp_path / "outputs")
    archive = drive / "checkpoints" / "mine.tgz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"is not what its \.sha256 says"):
        pulled(drive, tmp_path / "outputs")


def test_killed_pull_leaves_nothing_or_all(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    transfer.push(Place(str(drive)), made(tmp_path / "new", NEW), "checkpoints", "mine")
    for number in itertools.count(1):
        outputs = tmp_path / f"outputs{number}"
        target = outputs / "checkpoints" / "mine"

        def pull(outputs=outputs):
            place = Place(str(drive))
            entries = place.entries()
            transfer.pull(place, entries, names.find(entries, ["mine"]), outputs, "checkpoints")

        going = killed(pull, [outputs], number, tmp_path / "home")
        files = {"manifest.json", "tables"}
        assert not target.exists() or {path.name for path in target.iterdir()} == files
        assert not killed(pull, [outputs], 0, tmp_path / "home")
        assert {path.name for path in target.iterdir()} == files and hidden(outputs) == []
        if not going:
            break
    assert number > 8


def test_pulling_leaves_what_another_process_pulls_under_a_longer_name(tmp_path):
    drive, outputs = tmp_path / "drive", tmp_path / "outputs"
    drive.mkdir()
    (outputs / "checkpoints").mkdir(parents=True)
    for name in ("q4", "q4.v2"):
        transfer.push(Place(str(drive)), made(tmp_path / name, NEW), "checkpoints", name)
    place = Place(str(drive))
    entries = place.entries()
    with scratch.folder(outputs / "checkpoints" / "q4.v2") as running:
        transfer.pull(place, entries, names.find(entries, ["q4"]), outputs, "checkpoints")
        assert running.exists()


def test_killed_mirror_leaves_a_copy_of_the_run(tmp_path):
    run = tmp_path / "outputs" / "SR-001"
    run.mkdir(parents=True)
    for number in itertools.count(1):
        drive, home = tmp_path / f"drive{number}", tmp_path / f"home{number}"
        drive.mkdir(), home.mkdir()
        store = StoreConfig("there", StoreKind.gdrive, str(drive), mirror=True)

        def mirror(status, store=store):
            (run / "result.json").write_text(json.dumps({"status": status}))
            with transfer.mirrored(store, run, "SR-001"):
                pass

        (run / "mirror.txt").unlink(missing_ok=True)
        mirror("interrupted")
        going = killed(lambda mirror=mirror: mirror("complete"), [drive, home], number, home)
        copy = pulled(drive, tmp_path / "pulled", "runs", "SR-001")
        assert json.loads((copy / "result.json").read_text())["status"] in ("interrupted", "complete")
        mirror("complete")
        copy = pulled(drive, tmp_path / "pulled", "runs", "SR-001")
        assert json.loads((copy / "result.json").read_text())["status"] == "complete"
        assert hidden(drive) == []
        if not going:
            break
    assert number > 10


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
@pytest.mark.parametrize("what", ["pull", "push", "unpack"])
def test_a_disk_that_fills_is_told_with_its_place_and_holds_nothing_half(tmp_path, small_disk, what):  # noqa: F811
    drive = tmp_path / "drive"
    drive.mkdir()
    source = made(tmp_path / "new", NEW)
    size = {"pull": 300_000, "push": 300_000, "unpack": 1_000_000}[what]
    noise = bytes(size) if what == "unpack" else hashlib.shake_128(b"").digest(size)  # packs well, or not at all
    (source / "tables").write_bytes(noise)
    if what == "push":
        with pytest.raises(MachineError, match=rf"the disk is full at {small_disk}/checkpoints/mine\.tgz"):
            transfer.push(Place(str(small_disk)), source, "checkpoints", "mine")
        assert [path for path in small_disk.rglob("*") if path.is_file()] == []
        return
    transfer.push(Place(str(drive)), source, "checkpoints", "mine")
    with pytest.raises(MachineError, match=f"the disk is full at {small_disk}/outputs/checkpoints/"):
        pulled(drive, small_disk / "outputs")
    assert [path.name for path in small_disk.rglob("*") if path.suffix != ".lock"] == ["outputs", "checkpoints"]
