"""Bytes to lines of text: files compressed or not, with or without a byte order mark, lines of any length.

Nothing here holds more than a line, and of a line no more than asked for. Bytes that are no UTF-8 come as
lone surrogates (PEP 383), so that whoever takes a line can name its place and go on with the next one.
"""

import codecs
import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

from qat.compression import MISREAD, RATIO, decompressed, max_unpacked
from qat.data.files import TextFile
from qat.data.tally import Unusable
from qat.errors import ConfigError, MissingError, UnavailableError

LINE = 1 << 25  # characters of a line that are held at one time; longer than any useful row
PIECE = 1 << 16  # characters tokenized at one time: each needs hundreds of bytes of memory meanwhile
MARK = "\ufeff"  # the byte order mark, which has no meaning in decoded text
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
OTHERS = {b"PK\x03\x04": "a zip archive: unpack it first", b"%PDF": "a PDF: take out its text first"}

_SURROGATE = re.compile("[\ud800-\udfff]")


class Text:
    """The text of an opened file, read forwards.

    Every method raises
        ConfigError: the file is no text, is damaged or cut short.
        MissingError: it cannot be read at all.
    """

    def __init__(self, name: str, raw: IO[bytes]) -> None:
        """Finds out how the bytes of a file are packed and encoded."""
        self._name, self._read = name, 0
        self._max = max_unpacked(os.fstat(raw.fileno()).st_size)
        with self._told():
            plain = io.BufferedReader(cast(Any, decompressed(raw)))
            first = plain.peek(4)
        for magic, what in OTHERS.items():
            if first.startswith(magic):
                raise ConfigError(f"{name} is {what}")
        wide = any(first.startswith(mark) for mark in WIDE)
        self._text = io.TextIOWrapper(plain, "utf-16" if wide else "utf-8", "strict" if wide else "surrogateescape")

    def line(self, max_characters: int) -> str:
        """The rest of a line, at most so many characters of it; whatever ended it, it ends with a line feed."""
        with self._told():
            return self._counted(self._text.readline(max_characters))

    def read(self, max_characters: int) -> str:
        """The next characters, at most so many; none at the end."""
        with self._told():
            return self._counted(self._text.read(max_characters))

    def _counted(self, text: str) -> str:
        self._read += len(text)
        if self._read > self._max:
            raise ConfigError(f"{self._name} unpacks to more than {RATIO} times its size, which no text does")
        return text

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UnavailableError as error:
            raise UnavailableError(f"{self._name}: {error}") from None
        except MISREAD as error:
            raise ConfigError(f"{self._name} is damaged or cut short ({error})") from None
        except OSError as error:
            raise MissingError(f"{self._name} cannot be read ({error.strerror or error})") from None


@contextmanager
def opened(file: TextFile) -> Iterator[Text]:
    """The text of a file.

    Raises:
        ConfigError: it is no text, or damaged at its beginning.
        MissingError: it cannot be read at all.
        UnavailableError: its compression needs a package that is not installed.
    """
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open(file.fetch(), "rb"))
        except OSError as error:
            raise MissingError(f"{file.name} cannot be read ({error.strerror})") from None
        yield Text(file.name, raw)


def lines(file: TextFile, longest: int = LINE) -> Iterator[tuple[int, str]]:
    """Number and text of every line, its line feed included; a longer one comes in pieces, under one number.

    Raises:
        ConfigError, MissingError, UnavailableError: as `opened`.
    """
    number = 1
    with opened(file) as text:
        while piece := text.line(longest):
            yield number, piece.removeprefix(MARK)
            number += piece.endswith("\n")


def check(text: str) -> None:
    """Refuses data that is not text.

    Raises:
        Unusable: it holds bytes that were no UTF-8, or half of a surrogate pair.
    """
    strange = None if text.isascii() else _SURROGATE.search(text)
    if strange is None:
        return
    number = ord(strange[0])
    if 0xDC80 <= number <= 0xDCFF:  # surrogates that stand for undecodable bytes (PEP 383)
        raise Unusable("not UTF-8", f"byte 0x{number - 0xDC00:02x}", "convert it, as `iconv -f latin1 -t utf-8` does")
    raise Unusable("half of a surrogate pair", f"\\u{number:04x}")
