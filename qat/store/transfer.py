"""Pull, push and mirror: nothing half-copied ever stands where a whole thing is looked for."""

import hashlib
import itertools
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qat.artifacts import locked, write_text
from qat.config import Config, StoreConfig, StoreKind
from qat.errors import ArtifactError, MissingError, QatError
from qat.store import archives, names
from qat.store.archives import CAPS, Caps
from qat.store.places import Entry, Place, open_place

log = logging.getLogger(__name__)

CHECKSUM = ".sha256"
MIRROR_SECONDS = 120.0  # between two copies of a run
MIRROR_NAME = "mirror.txt"  # in a run's folder: what it is called in the store


def resolve(store: StoreConfig, outputs: Path, kind: str, wanted: list[str]) -> Path | None:
    """The folder of a named checkpoint or cache: in `outputs/`, else pulled; None where neither has it.

    Raises:
        ArtifactError: the store's copy is damaged or hostile.
        MissingError: the store cannot be reached.
    """
    for name in wanted:
        folder = names.local_folder(outputs, kind, name)
        if names.is_there(folder, kind):
            return folder
    if store.kind is StoreKind.local:
        return None
    place = open_place(store)
    entries = place.entries()
    found = names.find(entries, wanted)
    return pull(place, entries, found, outputs, kind) if found else None


def with_named(config: Config) -> Config:
    """The configuration with the folders of the registered checkpoint and cache that it names, pulled if need be.

    Raises:
        MissingError: nobody has the checkpoint. A cache that nobody has is made instead.
    """
    outputs, wanted = Path(config.outputs), names.checkpoint_names(config.checkpoint)
    checkpoint, cache = config.checkpoint, config.cache
    if wanted:
        folder = resolve(config.store, outputs, "checkpoints", wanted)
        if folder is None:
            raise MissingError(
                f"checkpoint={checkpoint.name} is neither in {outputs / 'checkpoints'} nor in the store: stage=store"
                " lists what is there"
            )
        checkpoint = replace(checkpoint, path=str(folder))
    named = names.cache_name(config)
    if named and (folder := resolve(config.store, outputs, "caches", [named])):
        cache = replace(cache, path=str(folder))
    return replace(config, checkpoint=checkpoint, cache=cache)


def pull(place: Place, entries: list[Entry], entry: Entry, outputs: Path, kind: str, caps: Caps = CAPS) -> Path:
    """Copies an archive or a folder of a store into `outputs`, checks it, and only then puts it in its place.

    Raises:
        ArtifactError: a checksum differs, the archive is hostile or damaged, or it holds something else.
    """
    target = names.local_folder(outputs, kind, archives.stem(entry.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if names.is_there(target, kind):
            return target
        if target.exists():
            raise ArtifactError(f"{target} is there and is none of the {kind}: move it away, then pull again")
        with _scratch(target) as scratch:
            unpacked = scratch / "unpacked"
            unpacked.mkdir()
            if entry.size is None:
                _pull_folder(place, entry, unpacked, caps)
            else:
                _pull_archive(place, entries, entry, unpacked, scratch, caps)
            inside = archives.content(unpacked)
            if not names.is_there(inside, kind):
                marks = " or ".join(names.MARKS[kind])
                raise ArtifactError(f"{entry.path} in {place.url} is none of the {kind}: no {marks} in it")
            inside.rename(target)
    log.info("pulled %s from %s to %s", entry.path, place.url, target)
    return target


def push(place: Place, folder: Path, kind: str, name: str) -> str:
    """Packs a folder and puts it into the store with its checksum beside it; returns its path there."""
    path = f"{kind}/{name}.tgz"
    with tempfile.TemporaryDirectory(prefix="qat-push-") as scratch:
        packed = Path(scratch) / f"{name}.tgz"
        archives.pack(folder, packed, name)
        listed = Path(scratch) / f"{name}.tgz{CHECKSUM}"
        listed.write_text(f"{_sha256(packed)}  {packed.name}\n")
        place.upload(packed, path)
        place.upload(listed, path + CHECKSUM)
    return path


@contextmanager
def mirrored(store: StoreConfig, folder: Path, run_id: str, seconds: float = MIRROR_SECONDS) -> Iterator[None]:
    """Copies a run to the store every so often while it goes on, and when it ends; never fails it.

    It never takes the place of another machine's run of the same number; under which name it is kept, the run
    remembers in its folder, and so does a copy of it that goes on elsewhere.
    """
    if not store.mirror or store.kind is StoreKind.local:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_mirror, args=(store, folder, run_id, seconds, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _mirror(store: StoreConfig, folder: Path, run_id: str, seconds: float, ended: threading.Event) -> None:
    place: Place | None = None
    before: object = None
    last = False
    while not last:
        last = ended.wait(seconds)
        try:
            if place is None:
                place = open_place(store)
                place.prepare()
            now = _state(folder)
            if now != before and names.is_there(folder, "runs"):  # none is left of one that was refused
                push(place, folder, "runs", _mirror_name(place, folder, run_id))
                before = now
        except (QatError, OSError) as error:  # a file replaced while it is read is copied the next time
            log.warning("%s was not mirrored: %s", run_id, error)


def _mirror_name(place: Place, folder: Path, run_id: str) -> str:
    """The run's identity, with a number behind it if the store had such a run before this one came."""
    note = folder / MIRROR_NAME
    if not note.exists():
        taken = {archives.stem(entry.name) for entry in place.entries() if entry.path.startswith("runs/")}
        others = (f"{run_id}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([run_id], others) if name not in taken)
        if name != run_id:
            log.warning("%s already has a run %s: this one is kept there as %s", place.url, run_id, name)
        write_text(note, name)
    return note.read_text(encoding="utf-8")


def _state(folder: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def _pull_archive(place: Place, entries: list[Entry], entry: Entry, unpacked: Path, scratch: Path, caps: Caps) -> None:
    archive = scratch / entry.name
    if entry.size and entry.size > caps.bytes:
        raise ArtifactError(f"{entry.path} in {place.url} has {entry.size} bytes, over the cap of {caps.bytes}")
    place.download(entry.path, archive, entry.size)
    if any(other.path == entry.path + CHECKSUM for other in entries):
        expected = re.match(r"\s*\\?([0-9a-fA-F]{64})\b", place.text(entry.path + CHECKSUM))
        if expected is None:
            raise ArtifactError(f"{entry.path}{CHECKSUM} in {place.url} holds no SHA-256: remove it or push again")
        if _sha256(archive) != expected[1].lower():
            raise ArtifactError(
                f"{entry.path} in {place.url} is not what its {CHECKSUM} says: it was altered or cut short; push again"
            )
    archives.unpack(archive, unpacked, caps)


def _pull_folder(place: Place, entry: Entry, unpacked: Path, caps: Caps) -> None:
    files = place.files_below(entry.path)
    total = sum(file.size or 0 for file in files)
    if len(files) > caps.files or total > caps.bytes:
        raise ArtifactError(f"{entry.path} in {place.url} has {len(files)} files, {total} bytes: over the cap")
    if not files:
        raise MissingError(f"{entry.path} in {place.url} is empty")
    for file in files:
        target = unpacked.joinpath(*archives.safe_parts(file.path, entry.path))
        target.parent.mkdir(parents=True, exist_ok=True)
        place.download(f"{entry.path}/{file.path}", target, file.size)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is swept away, by the next holder of its lock if need be."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
