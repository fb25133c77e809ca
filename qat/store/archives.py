"""Archives: written in a simple form, read as if each were hostile.

An archive is a compressed tar: `.tgz`, `.tar.gz`, `.tar.lz4`, `.tar.zst` or plain `.tar`. Reading one
extracts regular files and folders into an empty folder and refuses everything else: links, devices,
absolute and parent paths, names twice, more entries or bytes than a cap, data that unpack to many times the
archive's size, data cut short. The stream is read once from front to back, never more than a megabyte at a time,
so a bomb costs neither memory nor time nor, beyond the cap, disk. What passes is extracted by `tarfile` with its `data`
filter (PEP 706), which by itself knows no caps, and mends or lets pass what is refused here.
"""

import gzip
import io
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from qat import faults
from qat.compression import MISREAD, RATIO, gunzip, max_unpacked, unlz4, unzstd
from qat.errors import ArtifactError

SUFFIXES = (".tgz", ".tar.gz", ".tar.lz4", ".tar.zst", ".tar")
CHUNK = 1 << 20  # maximum bytes per read; no honest header of an archive is longer
DEPTH = 16  # maximum nesting of folders
RESERVED = frozenset('<>:"|?*\\')  # characters with a special meaning on some file system
NESTED = 3  # folder levels searched for the content, which older archives nest under its own name
CLUTTER = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True)
class Caps:
    """The most that an archive may hold."""

    files: int = 100_000  # maximum entries: files, and folders as often as they are named
    bytes: int = 64 << 30  # maximum unpacked bytes, four times the largest cache seen


CAPS = Caps()


def is_archive(name: str) -> bool:
    """True for a file name that this module reads."""
    return name.endswith(SUFFIXES)


def stem(name: str) -> str:
    """`q4_fp32` for `q4_fp32.tar.lz4`."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def pack(source: Path, path: Path, name: str) -> None:
    """Writes a folder, or a file with its `config.json`, as the archive `path`, the same bytes each time.

    All of it lies below the single folder `name` there.
    """
    folder = source if source.is_dir() else source.parent
    files = _own_files(folder) if source.is_dir() else [folder / "config.json", source]
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as stream,  # higher levels gain little
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for file in filter(Path.is_file, files):
            entry = tarfile.TarInfo(f"{name}/{file.relative_to(folder).as_posix()}")
            entry.size, entry.mode = file.stat().st_size, 0o644
            with open(file, "rb") as content:
                tar.addfile(entry, content)


def unpack(path: Path, folder: Path, caps: Caps = CAPS) -> int:
    """Extracts an archive into the empty folder `folder`; returns the bytes written.

    Raises:
        ArtifactError: the archive is damaged, cut short, or holds what it must not; `folder` then holds a part.
        UnavailableError: its compression needs a package that is not installed.
    """
    seen: dict[str, bool] = {}  # normalised name, and whether it is a folder
    listed: set[str] = set()  # names that have an entry of their own
    written = 0
    with _decompressed(path) as raw:
        stream = _Stream(raw, caps.bytes, path)
        try:
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:", errorlevel=2) as tar:
                for entry in _entries(tar, caps, path):
                    parts = _checked(entry, seen, listed, caps, path)
                    written += entry.size if entry.isreg() else 0
                    if written > caps.bytes:
                        raise ArtifactError(
                            f"{path.name} unpacks to more than {caps.bytes} bytes: nothing was taken over"
                        )
                    with faults.located(folder.joinpath(*parts)):
                        tar.extract(entry, folder, set_attrs=False, filter="data")
            stream.finish()
        except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError, RecursionError) as error:
            raise ArtifactError(f"{path.name} is damaged or cut short ({error})") from None
    return written


def content(folder: Path) -> Path:
    """The folder that holds the files: one or two folders down where an archive is nested under its own name."""
    for _ in range(NESTED):
        inside = [path for path in folder.iterdir() if path.name not in CLUTTER and not path.name.startswith("._")]
        if len(inside) != 1 or not inside[0].is_dir():
            break
        folder = inside[0]
    return folder


def safe_parts(name: str, source: str) -> tuple[str, ...]:
    """The parts of a relative path that stays where it is put.

    Raises:
        ArtifactError: it is absolute, goes up, or is no name on some file system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    strange = any(unicodedata.category(sign) in ("Cc", "Cs") or sign in RESERVED for sign in name)
    if name.startswith("/") or ".." in parts or strange or not parts:
        raise ArtifactError(
            f"{source} holds a file named {_shown(name)}: not a plain path inside, nothing was taken over"
        )
    if len(parts) > DEPTH or any(len(part.encode()) > 200 for part in parts):
        raise ArtifactError(f"{source} holds a path too long or too deep, {_shown(name)}: nothing was taken over")
    return tuple(parts)


def _entries(tar: tarfile.TarFile, caps: Caps, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members as they come, none of them kept, and counted whatever they are: a list of millions is a bomb too."""
    count = 0
    while (entry := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        count += 1
        if count > caps.files:
            raise ArtifactError(f"{path.name} holds more than {caps.files} files: nothing was taken over")
        yield entry


def _checked(
    entry: tarfile.TarInfo, seen: dict[str, bool], listed: set[str], caps: Caps, path: Path
) -> tuple[str, ...]:
    """The parts of an entry's name, once it is known to be a new plain file or a folder."""
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        kind = "a link" if entry.issym() or entry.islnk() else "neither a file nor a folder"
        raise ArtifactError(f"{path.name} holds {_shown(entry.name)}, {kind}: nothing was taken over")
    if entry.size < 0 or entry.size > caps.bytes:
        raise ArtifactError(f"{path.name} holds a file of {entry.size} bytes, over the cap of {caps.bytes}")
    top = entry.isdir() and not entry.name.strip("./")
    parts = () if top else safe_parts(entry.name, path.name)
    names = [""] if top else [_folded("/".join(parts[: depth + 1])) for depth in range(len(parts))]
    for parent in names[:-1]:
        if not seen.setdefault(parent, True):
            raise ArtifactError(f"{path.name} holds {_shown(entry.name)} below a file: nothing was taken over")
    if names[-1] in listed or (names[-1] in seen and not (entry.isdir() and seen[names[-1]])):
        raise ArtifactError(f"{path.name} holds {_shown(entry.name)} twice: nothing was taken over")
    seen[names[-1]] = entry.isdir()
    listed.add(names[-1])
    if len(seen) > caps.files:
        raise ArtifactError(f"{path.name} holds more than {caps.files} files: nothing was taken over")
    return parts


class _Stream:
    """A decompressed archive as `tarfile` reads it: forwards, in small pieces, up to a cap."""

    def __init__(self, raw: IO[bytes], cap: int, path: Path) -> None:
        self.raw, self.cap, self.path = raw, cap, path
        self.max_bytes = max_unpacked(path.stat().st_size)
        self.position = 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        if not 0 <= size <= CHUNK:
            raise ArtifactError(f"{self.path.name} has a header of {size} bytes, which no honest archive has")
        pieces, left = [], size
        while left and (piece := self._piece(left)):
            pieces.append(piece)
            left -= len(piece)
        self.last = b"".join(pieces)
        self.position += len(self.last)
        # Headers and padding count too, because an archive can be a bomb by its headers alone.
        if self.position > self.cap + (self.cap >> 4) + CHUNK:
            raise ArtifactError(f"{self.path.name} unpacks to more than {self.cap} bytes: nothing was taken over")
        if self.position > self.max_bytes:
            raise ArtifactError(f"{self.path.name} unpacks to more than {RATIO} times its size: nothing was taken over")
        return self.last

    def tell(self) -> int:
        """Bytes read so far."""
        return self.position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Skips forwards; an archive is never read twice."""
        if whence != io.SEEK_SET or position < self.position:
            raise ArtifactError(f"{self.path.name} refers back inside itself, which no honest archive does")
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass
        return self.position

    def finish(self) -> None:
        """Reads to the end, where the compression's own checksum is; an archive ends with a block of zeros.

        Raises:
            ArtifactError: it does not end there.
        """
        ended = len(self.last) == tarfile.BLOCKSIZE and not any(self.last)
        while self.read(CHUNK):
            pass
        if not ended:
            raise ArtifactError(f"{self.path.name} is cut short: it has no end mark; nothing was taken over")

    def _piece(self, size: int) -> bytes:
        try:
            return self.raw.read(size)
        except MISREAD as error:
            raise ArtifactError(f"{self.path.name} is damaged or cut short ({error})") from None


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The tar inside an archive, by the archive's name."""
    openers = {".tgz": gunzip, ".tar.gz": gunzip, ".tar.lz4": unlz4, ".tar.zst": unzstd}
    opener = next((opener for suffix, opener in openers.items() if path.name.endswith(suffix)), None)
    with open(path, "rb") as file:
        yield opener(file) if opener else file


def _folded(name: str) -> str:
    """The name as a file system sees it that ignores case and the ways to write an accent."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shown(name: str) -> str:
    return ascii(name if len(name) < 80 else f"{name[:77]}...")


def _own_files(folder: Path) -> list[Path]:
    """What a folder holds, without links, locks, half-written files and what a killed process left."""
    return [path for path in sorted(folder.rglob("*")) if not path.is_symlink() and not _is_scratch(path, folder)]


def _is_scratch(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") and part != ".hydra" for part in path.relative_to(folder).parts)
