"""Where text lies: files, globs, a data set of the hub. Files are found at once and read as they are needed."""

import glob
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qat.config import DataConfig
from qat.errors import ConfigError, MissingError, UnavailableError

log = logging.getLogger(__name__)

READABLE = (".json", ".jsonl", ".txt", ".parquet")  # of a hub data set; a path may have any name


@dataclass(frozen=True)
class TextFile:
    """A file that can be had: its name in messages, and how to get it."""

    name: str
    fetch: Callable[[], Path]


def find(data: DataConfig) -> list[TextFile]:
    """The files of a source, in order.

    Raises:
        ConfigError: neither path nor hub data set is named, or a pattern finds nothing.
        MissingError: the hub cannot be reached and has not been before.
    """
    return _on_disk(data) if data.path else _on_hub(data)[1]


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source, so that an edited file is a different data set; of the hub, of the commit.

    Raises:
        MissingError: a file cannot be read.
    """
    if not data.path:
        commit, files = _on_hub(data)
        return _hash(json.dumps([data.repo, commit, [file.name for file in files]]).encode())
    digests = [_hash_of(file) for file in _on_disk(data)]
    return digests[0] if len(digests) == 1 else _hash("".join(digests).encode())


def lines(file: TextFile) -> Iterator[str]:
    """The lines of a file; only a line feed ends one, whatever else JSON text may hold.

    Raises:
        MissingError: it is missing or not UTF-8.
    """
    path = file.fetch()
    try:
        with open(path, encoding="utf-8", newline="\n") as opened:
            yield from opened
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(f"{file.name} cannot be read as UTF-8 text ({error})") from None


def rows(file: TextFile) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, of JSON lines, or of a Parquet table.

    Raises:
        ConfigError: it is none of these, or a row is no object.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet(file)
        return
    for what, row in _json_values(file):
        if not isinstance(row, dict):
            raise ConfigError(f"{file.name} {what} is not a JSON object")
        yield row


def _json_values(file: TextFile) -> Iterator[tuple[str, Any]]:
    stream = enumerate(lines(file), 1)
    first = next(((number, line) for number, line in stream if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        whole = _parsed("".join([first[1], *(line for _, line in stream)]), file, f"from line {first[0]}")
        yield from ((f"row {number}", row) for number, row in enumerate(whole, 1))
        return
    for number, line in itertools.chain([first], stream):
        if line.strip():
            yield f"line {number}", _parsed(line, file, f"line {number}")


def _parsed(text: str, file: TextFile, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file.name} {where} is not JSON ({error})") from None


def _parquet(file: TextFile) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UnavailableError(f"{file.name} is a Parquet table: run `pip install pyarrow` to read it") from None
    for batch in ParquetFile(file.fetch()).iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _on_disk(data: DataConfig) -> list[TextFile]:
    patterns = [data.path] if isinstance(data.path, str) else data.path
    found: dict[str, TextFile] = {}
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = [expanded] if Path(expanded).exists() else sorted(glob.glob(expanded, recursive=True))
        if not matches:
            raise MissingError(f"data.path={pattern}: no such file")
        for match in matches:
            found[match] = TextFile(match, lambda path=match: Path(path))  # type: ignore[misc]
    return list(found.values())


def _on_hub(data: DataConfig) -> tuple[str, list[TextFile]]:
    """The commit and the files of a hub data set, each fetched when it is its turn."""
    if not data.repo:
        raise ConfigError(f"data={data.name} needs data.path=<file> or data.repo=<owner/name of a hub data set>")
    from huggingface_hub import hf_hub_download

    repo = data.repo
    commit, names = _listing(repo, data.revision)

    def fetch(name: str) -> Callable[[], Path]:
        return lambda: Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))

    chosen = sorted(name for name in names if name.endswith(READABLE) and not name.endswith("dataset_infos.json"))
    if not chosen:
        raise MissingError(f"the data set {repo} has no {', '.join(READABLE)} file")
    return commit, [TextFile(name, fetch(name)) for name in chosen]


@cache  # what was hashed is what is read, also when the data set changes meanwhile
def _listing(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit of a hub data set and the names of its files; of the local copy where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(repo, revision=revision)
        return str(info.sha), [entry.rfilename for entry in info.siblings or []]
    except Exception as reached:  # any of a dozen kinds of network trouble: what was fetched before will do
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
