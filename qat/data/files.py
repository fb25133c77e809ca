"""Where text lies: files, folders, globs, a data set of the hub. Files are found at once and read as needed."""

import glob
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

from qat.config import DataConfig
from qat.errors import ConfigError, MissingError

log = logging.getLogger(__name__)

# Endings of the files that are read in a folder or a hub data set; a file given by its path may have any name.
ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst", ".xz", ".bz2", ".lz4")
# Files that describe a data set and hold none of its rows.
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class TextFile:
    """A file that can be had: its name in messages, and how to get it."""

    name: str
    fetch: Callable[[], Path]

    def place(self, where: str) -> str:
        """`chat.jsonl line 7`."""
        return f"{PurePath(self.name).name} {where}"


def find(data: DataConfig, known: tuple[str, ...] = ROWS) -> list[TextFile]:
    """The files of a source, in order; of a folder or a hub data set those with a known ending.

    Raises:
        ConfigError: neither path nor hub data set is named, or nothing is there.
        MissingError: the hub cannot be reached and has not been before.
    """
    return _on_disk(data, known) if data.path else _on_hub(data, known)[1]


def content_hash(data: DataConfig, known: tuple[str, ...] = ROWS) -> str:
    """SHA-256 of the source, so that an edited file is a different data set; of the hub, of the commit.

    Raises:
        MissingError: a file cannot be read.
    """
    if not data.path:
        commit, files = _on_hub(data, known)
        return _hash(json.dumps([data.repo, commit, [file.name for file in files]]).encode())
    digests = [_hash_of(file) for file in _on_disk(data, known)]
    return digests[0] if len(digests) == 1 else _hash("".join(digests).encode())


def suffix(name: str) -> str:
    """`.jsonl` for `chat.jsonl.gz`."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in PACKED else path.suffix


def _readable(name: str, known: tuple[str, ...]) -> bool:
    """Whether a file among others is one of the source's."""
    path = PurePath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return suffix(name) in known and path.name not in ABOUT and not hidden


def _on_disk(data: DataConfig, known: tuple[str, ...]) -> list[TextFile]:
    patterns = [data.path] if isinstance(data.path, str) else data.path
    found = dict.fromkeys(path for pattern in patterns for path in _matches(pattern, known))
    return [TextFile(path, lambda path=path: Path(path)) for path in found]  # type: ignore[misc]


def _matches(pattern: str, known: tuple[str, ...]) -> list[str]:
    """The file of this name, the files of this folder, or those that a glob finds."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [str(file) for file in inside if _readable(str(file.relative_to(path)), known)]
        if not files:
            raise ConfigError(f"data.path={pattern}: this folder has no file of text ({', '.join(known)})")
        return files
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]
    if not files:
        raise ConfigError(f"data.path={pattern}: no such file")
    return files


def _on_hub(data: DataConfig, known: tuple[str, ...]) -> tuple[str, list[TextFile]]:
    """The commit and the files of a hub data set; each file is fetched when it is read."""
    if not data.repo:
        raise ConfigError(f"data={data.name} needs data.path=<file> or data.repo=<owner/name of a hub data set>")
    from huggingface_hub import hf_hub_download

    repo = data.repo
    commit, names = _listing(repo, data.revision)

    def fetch(name: str) -> Callable[[], Path]:
        return cache(lambda: Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit)))

    chosen = sorted(name for name in names if _readable(name, known))
    if not chosen:
        raise MissingError(f"the data set {repo} has no file of text ({', '.join(known)})")
    return commit, [TextFile(name, fetch(name)) for name in chosen]


@cache  # cached, so that what is read is what was hashed, even if the data set changes meanwhile
def _listing(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit of a hub data set and the names of its files; of the local copy where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(repo, revision=revision)
        return str(info.sha), [entry.rfilename for entry in info.siblings or []]
    except Exception as reached:  # network errors come in a dozen kinds; after any of them the local copy is used
        reason = str(reached).strip().partition("\n")[0] or type(reached).__name__
    try:
        there = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:
        raise MissingError(
            f"the data set {repo} is not in the local hub cache and cannot be reached ({reason}): run"
            f" `hf download --repo-type dataset {repo}` where there is a network, or use data.path=<file>"
        ) from None
    log.warning("the hub cannot be asked for the data set %s (%s): using its copy of %s", repo, reason, there.name[:12])
    return there.name, [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_of(file: TextFile) -> str:
    try:
        with open(file.fetch(), "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise MissingError(f"{file.name} cannot be read ({error.strerror})") from None
