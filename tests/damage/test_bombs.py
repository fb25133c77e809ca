"""Small files that would be large, long or deep: each is given up soon, whatever it is packed with."""

import gzip
import io
import json
import resource
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qat import compression, json_objects, tensor_files
from qat.cli import arguments, main
from qat.cli.extent import VALUES
from qat.data import rows as tables
from qat.data.files import TextFile
from qat.data.rows import rows
from qat.data.tally import Unusable
from qat.errors import ArtifactError, ConfigError
from qat.models import gguf_header
from qat.store import archives
from qat.store.archives import Caps

SECONDS, GIGABYTES = 20.0, 0.5


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 < GIGABYTES


def packed(suffix: str, pieces: Iterator[bytes]) -> bytes:
    """Pieces of a tar, compressed one after the other."""
    buffer = io.BytesIO()
    if suffix == ".tgz":
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
            for piece in pieces:
                file.write(piece)
        return buffer.getvalue()
    if suffix == ".tar.lz4":
        library = pytest.importorskip("lz4.frame")
        with library.open(buffer, "wb") as file:
            for piece in pieces:
                file.write(piece)
        return buffer.getvalue()
    library = pytest.importorskip("zstandard")
    with library.ZstdCompressor(level=1).stream_writer(buffer, closefd=False) as file:
        for piece in pieces:
            file.write(piece)
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    return made.tobuf(tarfile.GNU_FORMAT)


def refused(folder: Path, suffix: str, pieces: Iterator[bytes]) -> str:
    (folder / f"a{suffix}").write_bytes(packed(suffix, pieces))
    (folder / "out").mkdir()
    with pytest.raises(ArtifactError) as raised:
        archives.unpack(folder / f"a{suffix}", folder / "out")
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".tgz", ".tar.lz4", ".tar.zst"])
@pytest.mark.parametrize("name", ["q4/", "./"])
def test_one_folder_named_over_and_over_is_no_archive(tmp_path, suffix, name):
    one = entry(name, tarfile.DIRTYPE) * 1000
    assert "twice" in refused(tmp_path, suffix, (one for _ in range(200)))


def test_entries_count_whatever_they_are(tmp_path):
    folders = b"".join(entry(f"q4/{number}/", tarfile.DIRTYPE) for number in range(60))
    (tmp_path / "a.tar").write_bytes(folders + bytes(1024))
    with pytest.raises(ArtifactError, match="holds more than 50 files"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "out", Caps(files=50))


def test_what_unpacks_to_a_thousand_times_its_size_is_no_archive(tmp_path):
    nothing = bytes(1 << 20)
    head = entry("q4/weights.pt", size=3 << 30)
    said = refused(tmp_path, ".tar.zst", iter([head, *[nothing] * (1 << 10)]))
    assert "unpacks to more than 1000 times its size" in said
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) < 300e6


def test_headers_of_headers_are_no_archive(tmp_path):
    more = entry("././@LongLink", tarfile.GNUTYPE_LONGNAME, 1) + b"x" + bytes(511)
    assert "damaged" in refused(tmp_path, ".tgz", iter([more * 5000]))


def test_json_that_is_nothing_but_brackets(tmp_path):
    for content in (b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"):
        with pytest.raises(ValueError, match="nested too deep"):
            json_objects.parsed(content)
    with pytest.raises(ValueError, match="more than"):
        json_objects.parsed(b" " * (json_objects.MAX_BYTES + 1))
    (tmp_path / "a.jsonl").write_bytes(b'{"a":' * 1_000_000 + b'\n{"text": "fine"}\n')
    found = [row for _, row in rows(TextFile("a.jsonl", lambda: tmp_path / "a.jsonl"))]
    assert isinstance(found[0], Unusable) and found[1] == {"text": "fine"}


def written_out(lists: int) -> str:
    """Lists of ten names of lists of ten names."""
    inside = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, lists)]
    return "\n".join(["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]", *inside])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("run: {goal: " + "[" * 1000 + "]" * 1000 + "}", "nested too deep"),
        ("run: {goal: " + "[" * 60 + "]" * 60 + "}", "nested too deep"),
        ("a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 90)), "nested too deep"),
        (written_out(12), f"more than {VALUES:,} values"),
        ("a: &a [*a, *a]", "more than|nested too deep"),
        ("#" * (1 << 21), "more than 1,048,576 bytes"),
        (b"run: {goal: '\xff'}", "can't decode byte 0xff"),
    ],
    ids=["deep", "rather deep", "deep by names", "wide by names", "inside itself", "long", "latin1"],
)
def test_configurations_that_would_be_endless(tmp_path, content, said):
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"config\.yaml is no configuration that can be read \(.*({said})"):
        main.check(arguments.parse(["--config-path", str(tmp_path)]))


def test_words_that_are_no_text(tmp_path, capfd):
    for words in (["run.goal=\udcff"], ["--config-path", "\udcfe"], ["\udcff"]):
        assert main.main(words, lambda: pytest.fail("launched")) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1 and "is not UTF-8" in told


def test_rows_of_tables_are_no_longer_than_other_rows(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file, path = TextFile("a.parquet", lambda: path), tmp_path / "a.parquet"
    monkeypatch.setattr(tables, "LINE", 1 << 12)
    monkeypatch.setattr(tables, "TABLE", 1 << 13)
    monkeypatch.setattr(compression, "BOMB", 1 << 16)
    parquet.write_table(arrow.table({"text": ["x" * (1 << 13), "short", "x" * (1 << 13), "y"]}), path)
    found = [row for _, row in rows(file)]
    assert [isinstance(row, Unusable) for row in found] == [True, False, True, False] and found[1] == {"text": "short"}
    alike = arrow.table({"text": ["y" * (1 << 16)] * 60})
    parquet.write_table(alike, path, compression="zstd", use_dictionary=False)
    with pytest.raises(ConfigError, match="unpacks to more than 1000 times its size"):
        list(rows(file))


def test_gguf_that_claims_more_than_it_holds(tmp_path):
    def number(value: int, size: int = 8) -> bytes:
        return value.to_bytes(size, "little")

    head = b"GGUF" + number(3, 4)
    text = number(1) + b"a"
    claims = [
        head + number(2**60) + number(0),
        head + number(0) + number(2**60),
        head + number(0) + number(1) + number(2**40),
        head + number(0) + number(1) + text + number(9, 4) + number(4, 4) + number(2**60),  # a list of numbers
        head + number(0) + number(1) + text + number(9, 4) + number(9, 4) + number(2**60),  # of lists
        head + number(1) + number(0) + text + number(2**31, 4),  # dimensions
        head + number(1) + number(0) + text + number(1, 4) + number(2**40) + number(0, 4) + number(0),
        head + number(1) + number(0) + text + number(1, 4) + number(1) + number(0, 4) + number(2**50),
        b"GGUF",
        b"",
    ]
    for content in claims:
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.gguf is no GGUF file, or damaged \(.*download or install it again"):
            gguf_header.check(tmp_path / "a.gguf")


def test_a_number_of_ten_thousand_digits_is_no_number():
    with pytest.raises(ValueError, match="digits"):
        json_objects.parsed(b'{"a": ' + b"9" * 10_000 + b"}")
    assert json_objects.parsed(json.dumps({"a": 1}).encode()) == {"a": 1}


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_state_dicts_that_are_compressed_are_none_of_torch(tmp_path, part):
    torch.save({"x.lut": torch.arange(4.0)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in plain.namelist():
            made.writestr(name, bytes(1 << 26) if name.endswith(part) else plain.read(name))
    for mapped in (True, False):
        with pytest.raises(ValueError, match=r"is compressed, which torch\.save never does"):
            tensor_files.unpickled(tmp_path / "a.pt", "cpu", mapped)
