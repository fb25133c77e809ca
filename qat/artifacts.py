"""Results on disk: named by a key of their inputs, and published complete or not at all.

An artifact is a folder below `<outputs>/artifacts/<kind>/`, named `<name>-<key>`, where the key
hashes exactly the inputs that decide its content. It is made in scratch (`qat/scratch.py`) and
renamed once complete, so a killed process leaves nothing that looks finished. Its `manifest.json`
lists every file with size and SHA-256, checked whenever the artifact is opened.

An artifact that takes long is `resumable`: it is made in a partial folder with its own name, which stays if
the process ends, and the next process that asks for the artifact continues there.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qat import faults, json_objects, locks, manifests, processes, provenance, scratch, system
from qat.console import size, waiting
from qat.errors import ArtifactError, ConfigError, MachineError, MissingError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
POLL_SECONDS = 0.1  # seconds between two attempts to take a lock that another process holds
SETTLED_SECONDS = 2.0  # seconds; digests of younger files are not noted: a change might keep the time stamp
HEAD_START = 2.0  # seconds that other ranks wait, so that the first one, which shows progress, makes artifacts


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: where it lies and what its manifest says; `fresh` where it was made just now."""

    folder: Path
    manifest: dict[str, Any]
    fresh: bool = False

    @property
    def key(self) -> str:
        """The content key that other artifacts build theirs on."""
        return str(self.manifest["key"])


def content_key(inputs: Any) -> str:
    """Twelve hexadecimal digits that name `inputs`, any tree of JSON values, whatever its key order."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def obtain(
    root: Path,
    kind: str,
    name: str,
    inputs: dict[str, Any],
    make: Callable[[Path], dict[str, Any]],
    resumable: bool = False,
    at: dict[str, Any] | None = None,
) -> Artifact:
    """The artifact of these inputs, made if it is not there yet.

    Args:
        root: the artifacts folder.
        kind: `models`, `documents`, `caches` or `checkpoints`.
        name: what a person reads in the folder's name.
        inputs: everything that shapes the content, as JSON values.
        make: fills an empty folder and returns what the manifest says beside the inputs. Called at
            most once at a time for one key, also across processes.
        resumable: `make` may find in its folder what a killed process left there, and uses it. It
            writes each file under another name, flushed, and renames it: what has its name is whole;
            or notes in such a file what of another one is.
        at: the machine that makes it, which the manifest names beside the moment and the seconds.

    Raises:
        ArtifactError: the artifact is there and damaged.
    """
    folder, fresh = place(root, kind, name, inputs), False
    if not folder.exists():
        if not processes.place().first:
            time.sleep(HEAD_START)
        with locked(folder):
            if not folder.exists():
                described = {"kind": kind, "name": name, "key": content_key(inputs), "inputs": inputs}
                with publish(folder, described, resumable) as (made, manifest), provenance.clocked(made) as clock:
                    manifest.update(make(made))
                    manifest["made"] = provenance.made(clock(), at or {})
                fresh = True
    found = open_artifact(folder)
    if {found.manifest.get("key"), content_key(found.manifest.get("inputs"))} != {content_key(inputs)}:
        raise ArtifactError(f"{folder / MANIFEST} was altered (it is of other inputs): delete {folder} and run again")
    return replace(found, fresh=fresh)


def place(root: Path, kind: str, name: str, inputs: dict[str, Any]) -> Path:
    """Where the artifact of these inputs lies once it is made."""
    return root / kind / f"{name}-{content_key(inputs)}"


def partial(folder: Path) -> Path:
    """Where a resumable artifact is being made."""
    return folder.parent / f".{folder.name}{PARTIAL}"


@contextmanager
def publish(folder: Path, manifest: dict[str, Any], resumable: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields a folder and a manifest to fill; on success both appear at `folder` in one step.

    The folder is empty, or with `resumable` as an earlier process left it. A failure leaves nothing,
    or with `resumable` what was made so far; a `ConfigError` leaves nothing in either case, since what
    is asked for next has another key.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(faults.located(folder))
        made = stack.enter_context(_resumed(folder) if resumable else scratch.folder(folder))
        made.chmod(0o755)
        yield made, manifest
        _describe(made, manifest)
        (made / provenance.NOTE).unlink(missing_ok=True)
        scratch.replace_folder(made, folder)


def open_artifact(folder: Path) -> Artifact:
    """Reads the manifest and checks every file against it.

    Raises:
        ArtifactError: no manifest, or a file that is missing, cut short or altered.
    """
    manifest = read_manifest(folder)
    expected, remedy = manifest["files"], f"delete {folder} and run again"
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {remedy}")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}: {remedy}")
    for name, digest in digests(folder, expected).items():
        if digest != expected[name]["sha256"]:
            raise ArtifactError(f"{folder / name} was altered (its SHA-256 differs from the manifest's): {remedy}")
    return Artifact(folder, manifest)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files below `folder`, each read once for as long as it stays the same file.

    Reading tens of gigabytes before every run would cost more than some runs. What was read is noted
    beside the folder with size, time of change and inode, and holds while those do; a file changed in
    the last moments is never noted, and where the note cannot be written everything is read again.
    """
    note = _note(folder)
    known = _noted(note)
    states = {name: _state(folder / name) for name in names}
    unread = [name for name, state in states.items() if known.get(name, [None])[:-1] != state]
    read = dict(zip(unread, hashed([folder / name for name in unread]), strict=True))
    found = {name: read[name] if name in read else known[name][-1] for name in states}
    settled = time.time_ns() - SETTLED_SECONDS * 1e9
    fresh = {name: [*states[name], read[name]] for name in unread if states[name][1] < settled}
    if fresh:
        with suppress(OSError, MachineError):
            write_json(note, known | fresh)
    return found


def discard(folder: Path) -> None:
    """Removes an artifact: under its name there is all of it, or nothing."""
    _note(folder).unlink(missing_ok=True)
    scratch.discard(folder)


def hashed(paths: list[Path]) -> list[str]:
    """SHA-256 of each file, several at once: hashing leaves Python alone."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, paths))


def require_space(folder: Path, needed: int, what: str) -> None:
    """Checks that the disk of `folder` has room for `needed` bytes and a reserve.

    Raises:
        MissingError: they do not.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MissingError(
            f"{what} needs {size(needed)} in {folder} and {size(free)} are free there:"
            " free some, ask for less, or name another disk with outputs=<folder>"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest by the rules of `qat.manifests`, without checking the files that it lists.

    Raises:
        ArtifactError: it is missing, unreadable, or says what no manifest does.
    """
    path, remedy = folder / MANIFEST, f"delete {folder} and run again, or copy it again from where it came"
    try:
        manifest = json_objects.read(path)
        manifests.check(manifest)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {MANIFEST}: it is not a complete artifact of this project") from None
    except manifests.Wrong as wrong:
        raise ArtifactError(f"{path} is not a manifest of this project ({wrong}): {remedy}") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): {remedy}") from None
    return manifest


def require(artifact: Artifact, rule: manifests.Rule) -> None:
    """Checks that an artifact's manifest has the fields that its maker writes.

    Raises:
        ArtifactError: it does not.
    """
    try:
        rule(artifact.manifest, "")
    except manifests.Wrong as wrong:
        path = artifact.folder / MANIFEST
        raise ArtifactError(f"{path} was altered ({wrong}): delete {artifact.folder} and run again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file written by another process; empty if there is no file.

    Raises:
        ArtifactError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        return json_objects.read(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): delete or mend it") from None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that is either the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: to one beside it, flushed to disk, then renamed."""
    with faults.located(path), scratch.file(path) as made:
        with open(made, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(made, 0o644)
        os.replace(made, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of one artifact; a process that finds it taken says who has it, and waits.

    The lock lives as long as the process that took it, so a killed one blocks nobody.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    if (lock := locks.take(path)) is None:
        with waiting(f"another process is making {folder} ({locks.holder(path)})") as still:
            while (lock := locks.take(path)) is None:
                still()
                time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _resumed(folder: Path) -> Iterator[Path]:
    """The partial folder as an earlier process left it, without that process's temporary files."""
    made = partial(folder)
    made.mkdir(exist_ok=True)
    scratch.sweep(made)
    (made / MANIFEST).unlink(missing_ok=True)
    try:
        yield made
    except ConfigError:
        scratch.discard(made)
        raise


def _describe(made: Path, manifest: dict[str, Any]) -> None:
    """Puts all files on disk, lists them in the manifest and writes that."""
    files = sorted(path for path in made.rglob("*") if path.is_file() and path != made / provenance.NOTE)
    for path in files:
        path.chmod(0o644)  # safetensors makes its files private
        system.flush(path)
    manifest["files"] = {
        path.relative_to(made).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashed(files), strict=True)
    }
    write_json(made / MANIFEST, manifest)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ino]


def _note(folder: Path) -> Path:
    """The path of the note with the digests of a folder's files."""
    return folder.parent / f".{folder.name}.checked"


def _noted(note: Path) -> dict[str, list[Any]]:
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}
