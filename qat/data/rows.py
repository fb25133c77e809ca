"""Files to rows: JSON lines, JSON lists and what is around them, tables; one row at a time, each with its place.

A damaged line of JSON is left to whoever counts such things. In a list or a table there is no telling where the
next row begins, so damage there ends the reading.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from qat.compression import RATIO, max_unpacked
from qat.data.conversations import TURNS
from qat.data.files import TextFile, suffix
from qat.data.reading import LINE, MARK, Text, check, lines, opened
from qat.data.tally import Unusable
from qat.errors import ConfigError, UnavailableError
from qat.installation import to_install

Rows = Iterator[tuple[str, Any]]

LINES = (".jsonl", ".ndjson")  # endings of files with one row per line
CHUNK = 1 << 16  # characters read at once
BATCH = 64  # rows of a table that are decoded at one time
TABLE = 1 << 28  # bytes of a table that are decoded at one time, unless a single row is larger

_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(rf"[ \t\r\n{MARK}]*")


def rows(file: TextFile) -> Rows:
    """Every row of a file with its place, such as `chat.jsonl line 7`: an object, or why there is none.

    Raises:
        ConfigError: it is no file of rows, or damaged so that no further row can be found.
        MissingError: it cannot be read.
        UnavailableError: it needs a package that is not installed.
    """
    readers: dict[str, Callable[[TextFile], Rows]] = {
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    for where, row in readers.get(suffix(file.name), _json)(file):
        if isinstance(row, list):  # the row is a list of messages without an object around it
            row = {TURNS[0]: row}
        yield file.place(where), row if isinstance(row, dict | Unusable) else Unusable("not a JSON object")


def _json(file: TextFile) -> Rows:
    """A row a line where that is how the file begins, else one value over all of it."""
    some = (piece for _, piece in lines(file) if piece.strip())
    first, second = next(some, ""), next(some, "")
    some.close()
    if first.lstrip().startswith("["):
        lined = _is_value(first) and _is_value(second)
    else:
        lined = suffix(file.name) in LINES or _is_value(second) or bool(second and _is_value(first))
    return _lines(file) if lined or not first else _document(file)


def _is_value(line: str) -> bool:
    return isinstance(_parsed(line), dict | list)


def _lines(file: TextFile) -> Rows:
    """A row a line; only a line feed ends one, whatever else JSON text may hold."""
    long = 0  # the line that goes on and on
    for number, piece in lines(file):
        if number != long and piece.strip():
            value = _parsed(piece)
            if not piece.endswith("\n") and len(piece) >= LINE - len(MARK):
                long, value = number, Unusable(f"longer than {LINE:,} characters")
            yield f"line {number}", value


def _parsed(text: str) -> Any:
    """The value of a text, or why it has none."""
    try:
        check(text)
        return json.loads(text)
    except Unusable as unusable:
        return unusable
    except RecursionError:
        return Unusable("nested too deep")
    except ValueError as error:
        return Unusable("not JSON", _message(error))


def _message(error: ValueError) -> str:
    """What is wrong, without where: that counts lines of the piece that was parsed."""
    return str(error).partition(": line ")[0]


def _document(file: TextFile) -> Rows:
    """The rows of a list, or of the list in an object, or the object itself."""
    with opened(file) as text:
        values = _Values(file.name, text)
        if values.next() not in ("[", "{"):
            raise ConfigError(f"{file.name} holds no rows: data=text reads plain text")
        yield from values.elements() if values.next() == "[" else _members(values)
        if values.next():
            raise values.damaged("it goes on behind its end")


def _members(values: "_Values") -> Rows:
    row, listed = {}, False
    for name in values.names():
        if values.next() == "[" and name not in TURNS:
            listed = True
            yield from values.elements()
        else:
            row[name] = values.value()
    if not listed:
        yield "line 1", row


class _Values:
    """The values of a JSON text, one after another, of which no more is held than a row.

    Attributes:
        line: that was reached.
    """

    def __init__(self, name: str, text: Text) -> None:
        self._name, self._text = name, text
        self._held, self._at, self.line = "", 0, 1

    def next(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            space = _SPACE.match(self._held, self._at)
            self._pass(space.end() if space else self._at)
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def elements(self) -> Rows:
        """Those of a list that begins here, each with its place."""
        self.take("[")
        number = 0
        while self.next() not in ("]", ""):
            number += 1
            where = f"row {number} (line {self.line})"
            yield where, self.value()
            if self.next() != "]":
                self.take(",")
        self.take("]")

    def names(self) -> Iterator[str]:
        """Those of an object that begins here, at each of which a value must be taken."""
        self.take("{")
        while self.next() not in ("}", ""):
            name = self.value()
            self.take(":")
            yield name
            if self.next() != "}":
                self.take(",")
        self.take("}")

    def take(self, sign: str) -> None:
        """Passes over a sign that must be here."""
        if self.next() != sign:
            raise self.damaged(f"{sign} is missing" if self.next() else "it is cut short")
        self._pass(self._at + 1)

    def value(self) -> Any:
        """The value that begins here."""
        self.next()
        while True:
            try:
                value, end = _decode(self._held, self._at)
            except RecursionError:
                raise self.damaged("nested too deep") from None
            except ValueError as error:
                if len(self._held) - self._at > LINE:
                    raise self.damaged(f"a value of more than {LINE:,} characters") from None
                if not self._more():
                    raise self.damaged(_message(error)) from None
            else:
                # A value that ends where the text read so far ends may be incomplete.
                if end < len(self._held) or not self._more():
                    self._pass(end)
                    return value

    def damaged(self, why: str) -> ConfigError:
        """The error for text that is no valid JSON at this place."""
        return ConfigError(f"{self._name} line {self.line} is not JSON that can be read ({why})")

    def _pass(self, end: int) -> None:
        self.line += self._held.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Holds twice as much, so that what is parsed again stays in proportion; False at the end."""
        rest = self._held[self._at :]
        piece = self._text.read(max(CHUNK, len(rest)))
        self._held, self._at = rest + piece, 0
        return bool(piece)


def _csv(file: TextFile) -> Rows:
    csv.field_size_limit(LINE)
    tab = "\t" if suffix(file.name) == ".tsv" else ","
    reader: Any = csv.DictReader((piece for _, piece in lines(file)), delimiter=tab, strict=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", Unusable("more cells than the header names") if None in row else row
    except csv.Error as error:
        raise ConfigError(f"{file.name} line {reader.reader.line_num} is not CSV ({error})") from None


def _parquet(file: TextFile) -> Rows:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _needs_pyarrow(file) from None
    return _table(file, lambda: _parts(file, ParquetFile(file.fetch())))


def _parts(file: TextFile, table: Any) -> Iterator[Any]:
    """Some rows at a time: fewer where a value may be large, which is stored once for all rows that have it."""
    about = table.metadata
    groups = (about.row_group(number) for number in range(about.num_row_groups))
    sizes = [group.column(place).total_uncompressed_size for group in groups for place in range(about.num_columns)]
    largest = max(sizes, default=0)
    if largest > max_unpacked(os.path.getsize(file.fetch())):
        raise ConfigError(f"{file.name} unpacks to more than {RATIO} times its size, which no text does")
    yield from table.iter_batches(batch_size=max(1, min(BATCH, TABLE // max(1, largest))))


def _arrow(file: TextFile) -> Rows:
    """A table as `datasets` saves it to disk."""
    try:
        from pyarrow.ipc import open_stream
    except ImportError:
        raise _needs_pyarrow(file) from None
    return _table(file, lambda: open_stream(open(file.fetch(), "rb")))


def _table(file: TextFile, batches: Callable[[], Any]) -> Rows:
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches():
            for first in range(0, len(batch), BATCH):
                for row in _plain(batch.slice(first, BATCH)):
                    number += 1
                    yield f"row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        where = f" behind row {number}" if number else ""
        raise ConfigError(f"{file.name} is damaged{where} ({error})") from None


def _plain(batch: Any) -> Iterator[Any]:
    """Rows of a table as plain values; of one that is too long, why it is left out."""
    if batch.nbytes <= LINE:
        yield from batch.to_pylist()
        return
    for place in range(len(batch)):
        row = batch.slice(place, 1)
        yield Unusable(f"longer than {LINE:,} characters") if row.nbytes > LINE else row.to_pylist()[0]


def _needs_pyarrow(file: TextFile) -> UnavailableError:
    return UnavailableError(f"{file.name} is a table of Arrow: run `{to_install('parquet')}` to read it")
