"""Pull, push and mirror: an incomplete copy never lies where a complete one is expected."""

import hashlib
import itertools
import logging
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qat import faults, names, scratch
from qat.artifacts import locked, write_text
from qat.checkpoint_files import chosen
from qat.config import Config, StoreConfig, StoreKind
from qat.errors import ArtifactError, MissingError, QatError
from qat.store import archives
from qat.store import names as store_names
from qat.store.archives import CAPS, Caps
from qat.store.places import Entry, Place, open_place

log = logging.getLogger(__name__)

CHECKSUM = ".sha256"
MIRROR_SECONDS = 120.0  # seconds between two copies of a run to the store
MIRROR_NAME = "mirror.txt"  # file in a run's folder with the run's name in the store


def with_named(config: Config) -> Config:
    """The configuration with the folders of the checkpoint and the cache that it names, where its stage uses them.

    What is not here yet is pulled from the store, or unpacked; so is what `evaluate.against` names.

    Raises:
        ArtifactError: the store's copy is damaged or hostile.
        MissingError: nobody has it, or the store cannot be reached. A cache that is only a setting is recorded instead.
    """
    checkpoint, cache = config.checkpoint, config.cache
    if names.uses_checkpoint(config) and (start := names.start(config)):
        word = checkpoint.path or checkpoint.name
        found = _fetched(config.store, start, "checkpoints", word, names.aliases(word, checkpoint.archive))
        checkpoint = replace(checkpoint, path=str(found))
    for word in config.evaluate.against:
        if place := names.checkpoint(word, Path(config.outputs)):
            _fetched(config.store, place, "checkpoints", word, names.aliases(word))
    if names.uses_cache(config) and (folder := _cache(config)):
        cache = replace(cache, path=str(folder))
    return replace(config, checkpoint=checkpoint, cache=cache)


def _cache(config: Config) -> Path | None:
    """The folder of a cache that has a name; None where it is to be recorded."""
    wanted, place = names.cache_names(config), names.cached(config)
    if place is None:
        return _pulled(config.store, Path(config.outputs), "caches", wanted)
    return _fetched(config.store, place, "caches", str(config.cache.path), wanted)


def pull(
    place: Place, entries: list[Entry], entry: Entry, outputs: Path, kind: str, caps: Caps = CAPS, name: str = ""
) -> Path:
    """Copies an archive, a folder or a state dict of a store into `outputs`, checks it, and only then puts it in place.

    Args:
        place: the store.
        entries: all that it holds.
        entry: what is wanted of it.
        outputs: the outputs folder.
        kind: `checkpoints`, `caches` or `runs`.
        caps: the most that may arrive.
        name: what it is called from now on; without one, as in the store.

    Raises:
        ArtifactError: a checksum differs, the archive is hostile or damaged, or it holds something else.
    """
    target = store_names.local_folder(outputs, kind, name or store_names.own(entry))
    with _made(target, kind, f"{entry.path} in {place.url}") as unpacked:
        if unpacked is None:
            return target
        if archives.is_archive(entry.name):
            _pull_archive(place, entries, entry, unpacked, caps)
        else:
            _pull_files(place, _wanted(place, entries, entry, kind), unpacked, entry.path, caps)
    log.info("pulled %s from %s to %s", entry.path, place.url, target)
    return target


def push(place: Place, source: Path, kind: str, name: str) -> str:
    """Packs a folder, or a state dict with the `config.json` beside it, and puts it into the store with its checksum.

    Returns:
        Its path there.
    """
    path = f"{kind}/{name}.tgz"
    with scratch.folder(Path(tempfile.gettempdir()) / "qat-push") as made:
        packed = made / f"{name}.tgz"
        with faults.located(packed):
            archives.pack(source, packed, name)
        _put(place, packed, path)
    return path


def _put(place: Place, packed: Path, path: str) -> None:
    """Puts an archive and its checksum into the store.

    These are two files, and whoever reads may come at any moment, also after a kill. So while the archive takes the
    place of an older one, the checksum names both: the one that is there is always whole and known.
    """
    line, listed = f"{_sha256(packed)}  {packed.name}\n", packed.with_name(packed.name + CHECKSUM)
    if place.has(path + CHECKSUM):
        listed.write_text(f"{place.text(path + CHECKSUM).rstrip()}\n{line}", encoding="utf-8")
        place.upload(listed, path + CHECKSUM)
    place.upload(packed, path)
    listed.write_text(line, encoding="utf-8")
    place.upload(listed, path + CHECKSUM)


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
            if now != before and names.is_there(folder, "runs"):  # a refused run's folder is gone
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


def _fetched(store: StoreConfig, place: Path, kind: str, word: str, wanted: list[str]) -> Path:
    """The content at a path, fetched first if it is missing."""
    if place.exists():
        return place
    if file := names.archive_file(word):
        with _made(place, kind, str(file)) as unpacked:
            if unpacked is not None:
                archives.unpack(file, unpacked)
        return place
    found = _pulled(store, place.parent.parent, kind, wanted)
    if found is None:
        raise MissingError(f"{word} is neither in {place.parent} nor in the store: stage=store lists what is there")
    return found


def _pulled(store: StoreConfig, outputs: Path, kind: str, wanted: list[str]) -> Path | None:
    """What a store has under one of these names; None where it has nothing, or there is no store."""
    if store.kind is StoreKind.local or not wanted:
        return None
    place = open_place(store)
    entries = place.entries()
    found = store_names.find(entries, wanted)
    return pull(place, entries, found, outputs, kind, name=wanted[0]) if found else None


@contextmanager
def _made(target: Path, kind: str, what: str) -> Iterator[Path | None]:
    """Yields an empty folder whose content is checked and then moved to `target`; None if that is there already.

    Raises:
        ArtifactError: it is none of its kind, or something else is at `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        scratch.sweep(target.parent, target.name)
        if store_names.is_there(target, kind):
            yield None
            return
        if target.exists():
            raise ArtifactError(f"{target} is there and is none of the {kind}: move it away, then pull again")
        with faults.located(target), scratch.folder(target) as made:
            unpacked = made / "unpacked"
            unpacked.mkdir()
            yield unpacked
            inside = archives.content(unpacked)
            if not store_names.is_there(inside, kind):
                marks = " or ".join(store_names.MARKS[kind])
                raise ArtifactError(f"{what} is none of the {kind}: no {marks} in it")
            inside.rename(target)


def _pull_archive(place: Place, entries: list[Entry], entry: Entry, unpacked: Path, caps: Caps) -> None:
    if entry.size and entry.size > caps.bytes:
        raise ArtifactError(f"{entry.path} in {place.url} has {entry.size} bytes, over the cap of {caps.bytes}")
    archive = unpacked.parent / entry.name
    place.download(entry.path, archive, entry.size)
    _check_sum(place, entries, entry, archive)
    archives.unpack(archive, unpacked, caps)


def _check_sum(place: Place, entries: list[Entry], entry: Entry, archive: Path) -> None:
    """Compares with the checksum beside an archive, where there is one: it may name several, of which one is there."""
    if not any(other.path == entry.path + CHECKSUM for other in entries):
        return
    known = re.findall(r"^\s*\\?([0-9a-f]{64})\b", place.text(entry.path + CHECKSUM).lower(), re.MULTILINE)
    if not known:
        raise ArtifactError(f"{entry.path}{CHECKSUM} in {place.url} holds no SHA-256: remove it or push again")
    if _sha256(archive) not in known:
        raise ArtifactError(
            f"{entry.path} in {place.url} is not what its {CHECKSUM} says: it was altered or cut short; push again"
        )


def _wanted(place: Place, entries: list[Entry], entry: Entry, kind: str) -> list[tuple[str, Entry]]:
    """The files of a folder, or a state dict and what is beside it, each with its path in the store.

    A folder of training may hold many state dicts, each of gigabytes: only the one that is read is wanted.
    """
    if entry.size is not None:
        parent = entry.path.rpartition("/")[0]
        beside = [one for one in entries if one.path == f"{parent}/config.json".strip("/")]
        return [(one.path, Entry(one.name, one.size)) for one in (entry, *beside)]
    files = place.files_below(entry.path)
    states = [file.path for file in files if file.path.endswith(".pt")]
    if kind == "checkpoints" and len(states) > 1 and len({path.rpartition("/")[0] for path in states}) == 1:
        folder = states[0].rpartition("/")[0]
        kept = chosen([path.rpartition("/")[2] for path in states], f"{entry.path} in {place.url}")
        files = [file for file in files if file.path not in states or file.path == f"{folder}/{kept}".strip("/")]
    return [(f"{entry.path}/{file.path}", file) for file in files]


def _pull_files(place: Place, files: list[tuple[str, Entry]], unpacked: Path, source: str, caps: Caps) -> None:
    total = sum(file.size or 0 for _, file in files)
    if len(files) > caps.files or total > caps.bytes:
        raise ArtifactError(f"{source} in {place.url} has {len(files)} files, {total} bytes: over the cap")
    if not files:
        raise MissingError(f"{source} in {place.url} is empty")
    for path, file in files:
        target = unpacked.joinpath(*archives.safe_parts(file.path, source))
        target.parent.mkdir(parents=True, exist_ok=True)
        place.download(path, target, file.size)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
