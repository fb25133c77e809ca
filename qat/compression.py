"""Compressed streams of archives and texts, read forwards.

Readers here say when a stream is damaged or cut short, which not every library does by itself.
"""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from qat.errors import UnavailableError
from qat.installation import to_install

# Errors of a damaged stream: zlib, lzma and gzip raise their own and EOFError, lz4 raises RuntimeError.
MISREAD: tuple[type[Exception], ...] = (
    *(EOFError, gzip.BadGzipFile, zlib.error),
    *(lzma.LZMAError, RuntimeError, ValueError),
)

BOMB, RATIO = 1 << 28, 1000  # unpacked content may be 1000 times its file's size, or 256 MiB if that is more
FEED = 1 << 12  # compressed bytes passed on at a time; small, since four bytes may unpack to 128 KiB


def max_unpacked(packed: int) -> int:
    """Maximum unpacked bytes of a compressed file of this size, whatever the format."""
    return max(BOMB, RATIO * packed)


def gunzip(file: IO[bytes]) -> IO[bytes]:
    """A gzip stream, also of several members."""
    return cast(IO[bytes], gzip.GzipFile(fileobj=file))


def unxz(file: IO[bytes]) -> IO[bytes]:
    """An xz stream, also of several parts."""
    return cast(IO[bytes], lzma.open(file))


def bunzip2(file: IO[bytes]) -> IO[bytes]:
    """A bzip2 stream, also of several parts."""
    return cast(IO[bytes], bz2.open(file))


def unlz4(file: IO[bytes]) -> IO[bytes]:
    """An lz4 stream.

    Raises:
        UnavailableError: its package is not installed.
    """
    return cast(IO[bytes], package("lz4.frame", "lz4").open(file, "rb"))


def unzstd(file: IO[bytes]) -> IO[bytes]:
    """A Zstandard stream, also of several frames.

    Raises:
        UnavailableError: its package is not installed.
    """
    return cast(IO[bytes], _Zstandard(file))


OPENERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gunzip,
    b"(\xb5/\xfd": unzstd,
    b"\x04\x22M\x18": unlz4,
    b"\xfd7zXZ\0": unxz,
    b"BZh": bunzip2,
}


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """A file decompressed by the format that its first bytes show, or unchanged.

    Raises:
        UnavailableError: its compression needs a package that is not installed.
    """
    first = file.read(max(map(len, OPENERS)))
    file.seek(0)
    return next((opener(file) for magic, opener in OPENERS.items() if first.startswith(magic)), file)


def package(module: str, name: str) -> Any:
    """Imports a module of an optional package.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnavailableError(f"this file needs the package {name}: {to_install('store')}") from None


class _Zstandard(io.RawIOBase):
    """A Zstandard stream that says when it is cut short: the library's own reader just ends there."""

    def __init__(self, file: IO[bytes]) -> None:
        library = package("zstandard", "zstandard")
        self._file, self._error = file, library.ZstdError
        self._make = library.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready, self._at = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of a buffer; 0 bytes are the end."""
        while self._at == len(self._ready):
            data = self._file.read(FEED)
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed data end early")
                return 0
            self._ready, self._at = self._fed(data), 0
        piece = self._ready[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _fed(self, data: bytes) -> bytes:
        pieces = []
        try:
            while data:
                self._frame = self._frame or self._make()
                pieces.append(self._frame.decompress(data))
                data = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise ValueError(str(error)) from None
        return b"".join(pieces)
