"""Results on disk: keyed by what shaped them, published whole or not at all.

An artifact is a folder below `<outputs>/artifacts/<kind>/`, named `<name>-<key>`, where the key
hashes exactly the inputs that decide its content. It is made in a temporary folder beside its
final place and renamed once complete, so a killed process leaves nothing that looks finished. Its
`manifest.json` lists every file with size and SHA-256, checked whenever the artifact is opened.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import ArtifactError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
HEAD_START = 2.0  # seconds; of processes that train together the first should make things: it shows progress


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: where it lies and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """The content key that other artifacts build theirs on."""
        return str(self.manifest["key"])


def content_key(inputs: Any) -> str:
    """Twelve hexadecimal digits that name `inputs`, any tree of JSON values, whatever its key order."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def obtain(
    root: Path, kind: str, name: str, inputs: dict[str, Any], make: Callable[[Path], dict[str, Any]]
) -> Artifact:
    """The artifact of these inputs, made if it is not there yet.

    Args:
        root: the artifacts folder.
        kind: `models`, `documents`, `caches` or `checkpoints`.
        name: what a person reads in the folder's name.
        inputs: everything that shapes the content, as JSON values.
        make: fills an empty folder and returns what the manifest says beside the inputs. Called at
            most once at a time for one key, also across processes.

    Raises:
        ArtifactError: the artifact is there and damaged.
    """
    key = content_key(inputs)
    folder = root / kind / f"{name}-{key}"
    if not folder.exists():
        if os.environ.get("RANK", "0") != "0":
            time.sleep(HEAD_START)
        with locked(folder):
            if not folder.exists():
                with publish(folder, {"kind": kind, "name": name, "key": key, "inputs": inputs}) as (
                    scratch,
                    manifest,
                ):
                    manifest.update(make(scratch))
    return open_artifact(folder)


@contextmanager
def publish(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Gives an empty folder and the manifest to fill; both appear at `folder`, at once, on success."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch, manifest
        for path in _files(scratch):
            path.chmod(0o644)  # safetensors makes its files private
        manifest["files"] = {path.relative_to(scratch).as_posix(): _describe(path) for path in _files(scratch)}
        write_json(scratch / MANIFEST, manifest)
        _replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open_artifact(folder: Path) -> Artifact:
    """Reads the manifest and checks every file against it.

    Raises:
        ArtifactError: no manifest, or a file that is missing, cut short or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        _check(folder, name, expected)
    return Artifact(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, with no look at the files it lists.

    Raises:
        ArtifactError: it is missing or unreadable.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {MANIFEST}: it is not a complete artifact of this project") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): delete {folder} and run again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} is not a manifest of this project: delete {folder} and run again")
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that is either the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text atomically: to a file beside it, flushed to disk, then renamed."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of one artifact; a process that finds it taken says so and waits.

    The lock lives as long as the process that took it, so a killed one blocks nobody. What a killed
    one left half-made is swept away by the next holder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting: another process is making %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _check(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path, remedy = folder / name, f"delete {folder} and run again"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: {remedy}")
    if path.stat().st_size != expected["bytes"]:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}: {remedy}")
    if _describe(path)["sha256"] != expected["sha256"]:
        raise ArtifactError(f"{path} was altered (its SHA-256 differs from the manifest's): {remedy}")


def _replace_folder(scratch: Path, folder: Path) -> None:
    """Renames `scratch` to `folder`; an older `folder` (a checkpoint of the same run) makes way first."""
    if folder.exists():
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as old:
            os.rename(folder, Path(old) / "old")
            os.rename(scratch, folder)
    else:
        os.rename(scratch, folder)
