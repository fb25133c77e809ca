"""A store as a folder of files, wherever it is: every kind is a file system of fsspec.

A mounted Drive is a local folder; `gs://`, `s3://` and `file://` are what fsspec and its extras make of
them; a hub repository is `hf://owner/name`, through huggingface_hub.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qat import faults, scratch
from qat.config import StoreConfig, StoreKind
from qat.console import progress
from qat.errors import MissingError, UnavailableError

log = logging.getLogger(__name__)

CHUNK = 1 << 22
TEXT = 1 << 16  # maximum bytes read from a small text file
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
DEPTH = 3  # folder levels below a store's root that are searched for names
EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}
CLIENTS = ("aiohttp", "botocore", "gcsfs", "google", "httpcore", "httpx", "huggingface_hub", "requests", "s3fs")
COLAB = Path("/content/drive/MyDrive")
FOLDER = "qat"  # the store's folder at the top of a Google Drive

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file or folder of a store: its path below the store's root, and its size in bytes (None for a folder)."""

    path: str
    size: int | None

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


class Place:
    """One store, open."""

    def __init__(self, url: str) -> None:
        """Finds the file system that `url` names; nothing is read yet.

        Raises:
            UnavailableError: it needs a package that is not installed.
        """
        import fsspec

        self.url = url
        scheme = url.partition("://")[0] if "://" in url else "file"
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            package = EXTRAS.get(scheme, scheme)
            raise UnavailableError(f"store.path={url} cannot be opened ({error}): pip install {package}") from None
        self.is_local = scheme == "file"

    def prepare(self) -> None:
        """Makes a local store's folder where there is none yet.

        Raises:
            MissingError: not even the folder around it is there, so nothing is mounted.
        """
        if not self.is_local:
            return
        root = Path(self.root)
        if not root.parent.is_dir():
            raise MissingError(f"store {self.url}: {root.parent} is not there: is it mounted?")
        root.mkdir(exist_ok=True)

    def entries(self) -> list[Entry]:
        """Everything down to DEPTH folders, by path.

        Raises:
            MissingError: the store is not there.
        """
        found = self._attempt("listing", lambda: self._walk())
        return sorted(found, key=lambda entry: (entry.path.count("/"), entry.path))

    def download(self, path: str, target: Path, size: int | None = None) -> None:
        """Copies one file here, with progress."""

        def copy() -> None:
            with (
                self.fs.open(self._full(path), "rb") as source,
                faults.located(target),
                open(target, "wb") as file,
                progress(f"pulling {path}", size or 1, "bytes") as advance,
            ):
                while data := source.read(CHUNK):
                    file.write(data)
                    advance(len(data))

        self._attempt(f"reading {path}", copy)

    def upload(self, source: Path, path: str) -> None:
        """Copies one file there, with progress; it appears whole or not at all.

        Raises:
            MachineError: the disk there is full.
        """
        full = self._full(path)

        def copy() -> None:
            if not self.is_local:  # an object store shows a file only once it is closed
                self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
                self._send(source, full, path)
                return
            if not Path(self.root).is_dir():  # the Drive was unmounted: do not write into the empty mount point
                raise FileNotFoundError(f"{self.root} is gone")
            place = Path(full)
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch.sweep(place.parent)
            with faults.located(place), scratch.file(place) as made:
                self._send(source, str(made), path)
                made.chmod(0o644)
                made.replace(place)

        self._attempt(f"writing {path}", copy)

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        self.fs.invalidate_cache()
        return self._attempt(f"looking for {path}", lambda: bool(self.fs.exists(self._full(path))))

    def text(self, path: str) -> str:
        """A small file's text."""
        return self._attempt(
            f"reading {path}", lambda: str(self.fs.cat_file(self._full(path))[:TEXT], "utf-8", "replace")
        )

    def files_below(self, path: str) -> list[Entry]:
        """The files of one folder, with paths below it, of any depth."""
        full = self._full(path)
        found = self._attempt(f"listing {path}", lambda: self.fs.find(full, detail=True))
        start = full.rstrip("/") + "/"
        return sorted(
            (Entry(name.removeprefix(start), info.get("size")) for name, info in found.items()), key=lambda e: e.path
        )

    def _send(self, source: Path, target: str, path: str) -> None:
        size = source.stat().st_size
        with (
            open(source, "rb") as file,
            self.fs.open(target, "wb") as there,
            progress(f"pushing {path}", size, "bytes") as advance,
        ):
            while data := file.read(CHUNK):
                there.write(data)
                advance(len(data))
        if self.fs.size(target) != size:
            raise OSError(f"{self.fs.size(target)} of {size} bytes arrived")

    def _walk(self) -> list[Entry]:
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            raise FileNotFoundError("no such place")
        found = []
        for parent, folders, files in self.fs.walk(self.root, maxdepth=DEPTH, detail=True):
            below = parent[len(self.root) :].strip("/")
            for name, info in [*folders.items(), *files.items()]:
                size = None if info.get("type") == "directory" else info.get("size")
                found.append(Entry(f"{below}/{name}".strip("/"), size))
        return found

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}"

    def _attempt(self, what: str, do: Callable[[], T]) -> T:
        """Tries a few times: a mounted Drive and a bucket both fail now and then."""
        for attempt in range(ATTEMPTS):
            try:
                return do()
            except FileNotFoundError as error:
                raise MissingError(f"store {self.url}: {what} failed, not there ({error})") from None
            except Exception as error:
                if not _unreachable(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
                if attempt + 1 < ATTEMPTS:
                    log.warning("store %s: %s failed (%s); trying again", self.url, what, reason)
                    time.sleep(PAUSE * 2**attempt)
        raise MissingError(f"store {self.url}: {what} failed {ATTEMPTS} times ({reason}): is it mounted and reachable?")


def _unreachable(error: Exception) -> bool:
    """True for what file systems raise when a place cannot be reached or read."""
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in CLIENTS


def open_place(store: StoreConfig) -> Place:
    """The configured store.

    Raises:
        MissingError: no mounted Drive is found, or the configured folder is not there.
        UnavailableError: its file system needs a package that is not installed.
    """
    return Place(url_of(store))


def url_of(store: StoreConfig) -> str:
    """Where the configured store lies, as a URL or a folder."""
    if store.kind is StoreKind.gdrive:
        return str(Path(store.path).expanduser()) if store.path else str(drive() / FOLDER)
    path = str(store.path)
    prefix = {StoreKind.gcs: "gs://", StoreKind.hf: "hf://"}.get(store.kind, "")
    return path if "://" in path or not prefix else prefix + path


def drive() -> Path:
    """The top of the mounted Google Drive.

    Raises:
        MissingError: there is none where Colab, macOS or rclone mount one.
    """
    for folder in _drives():
        if folder.is_dir():
            return folder
    raise MissingError(
        "no Google Drive is mounted here (as Colab, macOS or rclone do): mount it, or give store.path=<folder>"
    )


def _drives(mounts: Path = Path("/proc/mounts")) -> Iterator[Path]:
    yield COLAB
    yield from sorted(Path.home().glob("Library/CloudStorage/GoogleDrive-*/My Drive"))
    if mounts.is_file():
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            _, where, kind, *_ = [*line.split(), "", "", ""]
            if kind == "fuse.rclone":
                yield Path(where.encode().decode("unicode_escape"))
