"""Archives: what is packed comes back whole; what is hostile writes nothing outside and is told in a sentence."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.errors import ArtifactError, QatError
from qat.store import archives
from qat.store.archives import Caps

SMALL = Caps(files=50, bytes=1 << 20)


def entry(name, kind=tarfile.REGTYPE, size=0, **attributes):
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def tar_of(*entries, pax=None):
    """A tar whose entries may be anything; each an entry, or an entry with its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax) as tar:
        for one in entries:
            header, data = one if isinstance(one, tuple) else (one, b"")
            header.size = header.size or len(data)
            tar.fileobj.write(header.tobuf(tarfile.PAX_FORMAT))
            tar.offset += 512
            tar.fileobj.write(data + b"\0" * (-len(data) % 512))
            tar.offset = tar.fileobj.tell()
    return buffer.getvalue()


def compressed(data, suffix):
    if suffix == ".tar":
        return data
    if suffix in (".tgz", ".tar.gz"):
        return gzip.compress(data, mtime=0)
    if suffix == ".tar.lz4":
        return pytest.importorskip("lz4.frame").compress(data, content_checksum=True)
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


FINE = tar_of((entry("q4/a.txt"), b"hello" * 300), (entry("q4/deep/b.bin"), bytes(range(256))))


def hostile(dice):
    """One archive made to do harm, with its suffix; about twenty kinds, each with random parts."""
    word = "".join(dice.choices("abcxyz", k=4))
    up = "../" * dice.randint(1, 9)
    kinds = [
        lambda: tar_of((entry(f"{up}{word}"), b"out")),
        lambda: tar_of((entry(f"/tmp/qat-hostile-{word}"), b"out")),
        lambda: tar_of((entry(f"a/{up}../{word}"), b"out")),
        lambda: tar_of(entry(word, tarfile.SYMTYPE, linkname=up), (entry(f"{word}/{word}"), b"out")),
        lambda: tar_of(entry(word, tarfile.SYMTYPE, linkname="/tmp")),
        lambda: tar_of((entry("a"), b"x"), entry(word, tarfile.LNKTYPE, linkname=f"{up}etc/passwd")),
        lambda: tar_of(entry(word, dice.choice([tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]), devmajor=1)),
        lambda: tar_of((entry(word), b"1"), (entry(word), b"2")),
        lambda: tar_of((entry(word), b"1"), (entry(word.upper()), b"2")),
        lambda: tar_of((entry(f"./{word}"), b"1"), (entry(f"{word}//"), b"2")),
        lambda: tar_of((entry(word), b"1"), (entry(f"{word}/{word}"), b"2")),
        lambda: tar_of(*[(entry(f"{word}{i}"), b"") for i in range(dice.randint(51, 90))]),
        lambda: tar_of((entry(word), bytes(dice.randint(1 << 20, 1 << 22) + 1))),
        lambda: tar_of(*[(entry(f"{word}{i}"), bytes(1 << 18)) for i in range(dice.randint(5, 9))]),
        lambda: tar_of(entry(word, size=1 << dice.randint(21, 62))),
        lambda: tar_of(entry(word, size=-dice.randint(1, 1 << 30))),
        lambda: tar_of((entry(word), b"x"), pax={"path": f"{up}{word}", "comment": "c" * 100}),
        lambda: tar_of(entry("x", tarfile.XHDTYPE, size=1 << dice.randint(21, 50))),
        lambda: tar_of(entry("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1 << dice.randint(21, 50))),
        lambda: tar_of((entry(f"C:\\{word}"), b"out")),
        lambda: tar_of((entry(f"{word}\n\x1b[2J"), b"out")),
        lambda: tar_of((entry("/".join([word] * dice.randint(17, 40))), b"out")),
        lambda: FINE[: dice.randrange(1, len(FINE) - 9000)],
        lambda: dice.randbytes(dice.randint(0, 5000)),
        lambda: bytes(5000),
    ]
    suffix = dice.choice([".tar", ".tgz", ".tar.gz"])
    data = compressed(dice.choice(kinds)(), suffix)
    if dice.random() < 0.2:
        data = data[: dice.randrange(len(data) + 1)]
    return data, suffix


def below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_two_hundred_hostile_archives_write_nothing_outside(tmp_path):
    dice = random.Random(7)
    told = 0
    for number in range(200):
        room = tmp_path / str(number)
        inside = room / "deep" / "inside"
        inside.mkdir(parents=True)
        data, suffix = hostile(dice)
        archive = room / f"archive{suffix}"
        archive.write_bytes(data)
        (room / "sentinel").write_text("here first")
        before = below(room)
        try:
            archives.unpack(archive, inside, SMALL)
        except ArtifactError as error:
            told += 1
            assert "\n" not in str(error) and "\x1b" not in str(error) and "archive" in str(error)
        after = below(room)
        assert {path: data for path, data in after.items() if inside not in path.parents} == before
        assert not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in after)
        assert sum(path.stat().st_size for path in inside.rglob("*") if path.is_file()) <= SMALL.bytes
    assert told >= 190
    assert not list(Path("/tmp").glob("qat-hostile-*"))


@pytest.mark.parametrize("suffix", archives.SUFFIXES)
def test_every_compression_is_read(tmp_path, suffix):
    archive = tmp_path / f"q4{suffix}"
    archive.write_bytes(compressed(FINE, suffix))
    out = tmp_path / "out"
    out.mkdir()
    assert archives.unpack(archive, out) == 1756
    assert (out / "q4" / "a.txt").read_text() == "hello" * 300
    assert (out / "q4" / "deep" / "b.bin").read_bytes() == bytes(range(256))


@pytest.mark.parametrize("suffix", archives.SUFFIXES)
def test_archive_cut_short_anywhere_is_refused(tmp_path, suffix):
    whole = compressed(FINE, suffix)
    end = FINE.rindex(bytes(range(256))) + 512 if suffix == ".tar" else len(whole) - 1
    for cut in sorted({0, 1, 100, 512, 513, 2560, end // 2, end} & set(range(end + 1))):
        archive = tmp_path / f"cut{suffix}"
        archive.write_bytes(whole[:cut])
        out = tmp_path / f"out{cut}"
        out.mkdir()
        with pytest.raises(ArtifactError):
            archives.unpack(archive, out)


@pytest.mark.parametrize("suffix", [".tgz", ".tar.lz4", ".tar.zst"])
def test_flipped_bit_is_noticed(tmp_path, suffix):
    whole = bytearray(compressed(FINE, suffix))
    dice = random.Random(1)
    noticed = 0
    for place in dice.sample(range(len(whole) // 2, len(whole) - 8), 20):
        bad = bytearray(whole)
        bad[place] ^= 1 << dice.randrange(8)
        archive = tmp_path / f"bad{suffix}"
        archive.write_bytes(bad)
        out = tmp_path / f"out{place}"
        out.mkdir()
        try:
            archives.unpack(archive, out)
        except ArtifactError:
            noticed += 1
        else:  # a few bits of deflate mean nothing: the same bytes come out
            assert (out / "q4" / "a.txt").read_text() == "hello" * 300
            assert (out / "q4" / "deep" / "b.bin").read_bytes() == bytes(range(256))
    assert noticed >= 15


names = st.text("abcXYZ019._- é", min_size=1, max_size=12).filter(lambda name: name.strip(". ") and name[0] not in ".")


@given(st.dictionaries(st.tuples(names, names), st.binary(max_size=3000), min_size=1, max_size=8))
def test_what_is_packed_comes_back(tmp_path_factory, files):
    home = tmp_path_factory.mktemp("pack")
    folder, out = home / "made", home / "out"
    folded = {(a.casefold(), b.casefold()) for a, b in files}
    firsts = {a.casefold(): a for a, _ in files}
    if len(folded) < len(files) or any(firsts[a.casefold()] != a for a, _ in files):
        return  # alike but for case: refused, see above
    for (parent, name), data in files.items():
        (folder / parent).mkdir(parents=True, exist_ok=True)
        (folder / parent / name).write_bytes(data)
    out.mkdir()
    archives.pack(folder, home / "a.tgz", "made")
    archives.unpack(home / "a.tgz", out)
    assert {path.relative_to(out / "made"): data for path, data in below(out / "made").items()} == {
        path.relative_to(folder): data for path, data in below(folder).items()
    }


def test_packing_is_reproducible_and_leaves_scratch_out(tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("a: 1")
    (folder / ".best.x.scratch").mkdir()
    (folder / ".best.x.scratch" / "half").write_text("half")
    for name in ("one.tgz", "two.tgz"):
        archives.pack(folder, tmp_path / name, "run")
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tgz").read_bytes()
    with tarfile.open(tmp_path / "one.tgz") as tar:
        assert tar.getnames() == ["run/.hydra/config.yaml"]


@pytest.mark.parametrize("nest", ["", "q4/", "q4/q4/"])
def test_nested_content_is_found(tmp_path, nest):
    archive = tmp_path / "q4.tar"
    archive.write_bytes(
        tar_of((entry(f"{nest}config.json"), b"{}"), (entry(f"{nest}m.pt"), b"x"), (entry("._q4"), b""))
    )
    out = tmp_path / "out"
    out.mkdir()
    archives.unpack(archive, out)
    assert sorted(path.name for path in archives.content(out).iterdir() if path.name[0] != ".") == [
        "config.json",
        "m.pt",
    ]


def test_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.tar.zst").write_bytes(b"x")
    with pytest.raises(QatError, match=r"needs the package zstandard: pip install -e '\.\[store\]'"):
        archives.unpack(tmp_path / "a.tar.zst", tmp_path)
