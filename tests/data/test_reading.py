"""Bytes to lines, however they are packed and encoded, and the sentence where they are no text."""

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pytest

from qat import compression
from qat.data import reading
from qat.data.files import TextFile
from qat.data.reading import check, lines
from qat.data.tally import Unusable
from qat.errors import ConfigError, UnavailableError

TEXT = "one\n\nzwei ü 😀\nthree"


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


def lz4(data):
    return pytest.importorskip("lz4.frame").compress(data)


@pytest.fixture
def read(tmp_path):
    """Numbers and pieces of a file with these bytes."""

    def make(content, name="a.txt", longest=reading.LINE):
        (tmp_path / name).write_bytes(content)
        return list(lines(TextFile(str(tmp_path / name), lambda: tmp_path / name), longest))

    return make


PACKINGS = [lambda data: data, gzip.compress, bz2.compress, lzma.compress, zstd, lz4]


@pytest.mark.parametrize("pack", PACKINGS)
def test_first_bytes_say_how_a_file_is_packed(read, pack):
    """Whatever its name: browsers unpack what they fetch and leave the name alone."""
    lines_of_text = [(number, line) for number, line in enumerate(TEXT.splitlines(keepends=True), 1)]
    for name in ("a.txt", "a.txt.gz"):
        assert read(pack(TEXT.encode()), name) == lines_of_text


@pytest.mark.parametrize("pack", PACKINGS[1:])
def test_parts_packed_one_after_another_are_one_text(read, pack):
    assert "".join(piece for _, piece in read(pack(b"one\n") + pack(b"two\n"))) == "one\ntwo\n"


@pytest.mark.parametrize("pack", PACKINGS[1:])
def test_a_file_that_is_cut_short_is_told(read, pack):
    with pytest.raises(ConfigError, match=r"a\.txt is damaged or cut short"):
        read(pack(TEXT.encode() * 1000)[:-6])


def test_a_packing_without_its_package_says_what_to_install(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnavailableError, match=r"a\.txt: this file needs the package zstandard: pip install"):
        read(b"(\xb5/\xfdxxxx")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(read, encoding):
    assert "".join(piece for _, piece in read(TEXT.encode(encoding))) == TEXT


def test_marks_of_files_that_were_put_together_are_no_text_either(read):
    assert [piece for _, piece in read(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")] == ["one\n", "two\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(read, end):
    assert read(f"one{end}{end}two{end}".encode()) == [(1, "one\n"), (2, "\n"), (3, "two\n")]


def test_other_separators_stay_inside_their_line(read):
    text = "one\u2028two\x85three\x0cfour"
    assert read(text.encode()) == [(1, text)]


def test_a_long_line_comes_in_pieces_under_one_number(read):
    assert read(b"abcdefg\nhi\n", longest=3) == [(1, "abc"), (1, "def"), (1, "g\n"), (2, "hi\n")]


def test_bytes_that_are_no_utf8_spoil_their_own_line_alone(read):
    (_, one), (_, two) = read(b"caf\xe9\nfine\n")
    check(two)
    with pytest.raises(Unusable, match="not UTF-8") as said:
        check(one)
    assert said.value.detail == "byte 0xe9" and "iconv" in said.value.remedy


def test_half_of_a_pair_is_no_text():
    check("😀")
    with pytest.raises(Unusable, match="half of a surrogate pair"):
        check("a \ud83d b")


@pytest.mark.parametrize(("content", "said"), [(b"PK\x03\x04", "a zip archive: unpack it"), (b"%PDF-1.7", "a PDF")])
def test_files_that_hold_text_inside_say_so(read, content, said):
    with pytest.raises(ConfigError, match=rf"a\.txt is {said}"):
        read(content)


def test_what_unpacks_without_end_is_given_up(read, monkeypatch):
    monkeypatch.setattr(compression, "BOMB", 1 << 16)
    plain = read(b" " * (1 << 17) + b"\n")
    assert sum(len(piece) for _, piece in plain) == (1 << 17) + 1
    with pytest.raises(ConfigError, match="unpacks to more than 1000 times its size"):
        read(bz2.compress(b" " * (1 << 20)), longest=1 << 10)


def test_a_missing_file_is_told(tmp_path):
    gone = TextFile("gone.txt", lambda: Path(tmp_path / "gone.txt"))
    with pytest.raises(Exception, match=r"gone\.txt cannot be read \(No such file"):
        list(lines(gone))
