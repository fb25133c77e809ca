"""Rows of files in every form that people give them, one at a time and each with its place."""

import json
import re
import sys
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data import rows as module
from qat.data.files import TextFile, suffix
from qat.data.reading import Text
from qat.data.rows import rows
from qat.data.tally import Unusable
from qat.errors import ConfigError, UnavailableError

ROWS = [{"a": 1}, {"a": [{"b": "x\ny"}]}, {"a": None}]


@pytest.fixture
def file(tmp_path):
    def make(content, name="a.jsonl"):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return TextFile(str(tmp_path / name), lambda: tmp_path / name)

    return make


def shown(found):
    """Places and rows, reasons where there are none."""
    return [(place, row.reason if isinstance(row, Unusable) else row) for place, row in found]


def values(found):
    return [row for _, row in found]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL.gz", "a"])
def test_lines(file, name):
    text = "\n".join(map(json.dumps, ROWS[:2])) + "\n\n  \n" + json.dumps(ROWS[2])
    assert shown(rows(file(text, name))) == [(f"{name} line {n}", row) for n, row in zip((1, 2, 5), ROWS, strict=True)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "around", [lambda rows: rows, lambda rows: {"data": rows}, lambda rows: {"n": 3, "rows": rows, "license": "x"}]
)
def test_a_list_and_an_object_around_it(file, indent, around):
    assert values(rows(file(json.dumps(around(ROWS), indent=indent), "a.json"))) == ROWS


def test_an_object_around_rows_that_have_a_line_each(file):
    text = '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}"
    assert shown(rows(file(text, "a.json")))[1] == ("a.json row 2 (line 3)", ROWS[1])


def test_turns_of_a_lone_conversation_are_no_rows(file):
    row = {"messages": [{"role": "user", "content": "q"}]}
    assert values(rows(file(json.dumps(row, indent=1), "a.json"))) == [row]


def test_lists_of_messages_are_conversations(file):
    turns = [[{"role": "user", "content": str(n)}] for n in range(2)]
    assert values(rows(file("\n".join(map(json.dumps, turns))))) == [{"messages": one} for one in turns]
    assert values(rows(file(json.dumps(turns), "a.json"))) == [{"messages": one} for one in turns]


@pytest.mark.parametrize("first", ['{"messages": [{"role": "user",', "{", "no json"])
def test_a_damaged_line_is_named_and_gone_on_from(file, first):
    found = shown(rows(file("\n".join([first, *map(json.dumps, ROWS)]))))
    assert found == [("a.jsonl line 1", "not JSON"), *((f"a.jsonl line {n}", row) for n, row in enumerate(ROWS, 2))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "nested too deep"),
        ("1" * 5000, "not JSON"),
        ("3", "not a JSON object"),
        ("null", "not a JSON object"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        ('{"a": "\0"}', "not JSON"),
    ],
)
def test_lines_that_are_no_row(file, line, reason):
    line = line.encode() if isinstance(line, str) else line
    found = shown(rows(file(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')))
    assert found == [("a.jsonl line 1", {"a": 1}), ("a.jsonl line 2", reason), ("a.jsonl line 3", {"a": 2})]


def test_a_line_without_end_is_passed_over(file, monkeypatch):
    monkeypatch.setattr(module, "LINE", 40)
    monkeypatch.setattr(module, "lines", lambda file: _lines(file, 40))
    text = '{"a": 1}\n{"a": "' + "x" * 200 + '"}\n{"a": 2}\n'
    found = shown(rows(file(text)))
    assert found[1] == ("a.jsonl line 2", "longer than 40 characters") and values(found)[::2] == [{"a": 1}, {"a": 2}]


_lines = module.lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1},\n{"a": }]', r"a\.json line 2 is not JSON that can be read \(Expecting value\)"),
        ('[{"a": 1},\n{"a": 2}', r"a\.json line 2 is not JSON that can be read \(it is cut short\)"),
        ('[{"a": 1}\n{"a": 2}]', r"a\.json line 2 is not JSON that can be read \(, is missing\)"),
        ('[{"a": 1}]\nmore', r"a\.json line 2 is not JSON that can be read \(it goes on behind its end\)"),
        ('{"data": [\n{"a": 1},\n{"a": 2}', r"it is cut short"),
        ("[" * 100_000, "nested too deep"),
        ("A line.\nAnother.", r"a\.json holds no rows: data=text reads plain text"),
    ],
)
def test_damage_where_no_next_row_can_be_found_is_told_by_line(file, text, said):
    with pytest.raises(ConfigError, match=said):
        list(rows(file(text, "a.json")))


def test_a_list_is_read_row_by_row(file):
    text = "[" + ",".join(["{}"] * 20_000) + ", broken]"
    assert len(list(islice(rows(file(text, "a.json")), 15_000))) == 15_000


def test_no_more_than_a_row_is_held(file, monkeypatch):
    monkeypatch.setattr(module, "LINE", 100)
    monkeypatch.setattr(module, "CHUNK", 10)
    with pytest.raises(ConfigError, match=r"line 1 .*a value of more than 100 characters"):
        list(rows(file('[{"a": 1}, {"a": "' + "x" * 1000 + '"}]', "a.json")))


def test_an_empty_file_has_no_rows(file):
    for name in ("a.json", "a.jsonl", "a.csv"):
        assert list(rows(file("" if name == "a.csv" else "\n \n", name))) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=6)


@settings(max_examples=25)
@given(OBJECTS, st.sampled_from([None, 1, 3]), st.integers(1, 9))
def test_pieces_of_any_size_give_the_values_of_the_whole(tmp_path_factory, listed, indent, chunk):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(listed, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        with open(path, "rb") as raw:
            found = [value for _, value in module._Values("a.json", Text("a.json", raw)).elements()]
    assert found == json.loads(path.read_text(encoding="utf-8")) == listed


def test_tables_of_text(file):
    text = 'question,answer\r\n"a, b","one\r\n""two"""\r\nc,d\r\n'
    want = [{"question": "a, b", "answer": 'one\n"two"'}, {"question": "c", "answer": "d"}]
    assert values(rows(file(text, "a.csv"))) == want
    tabs = 'question\tanswer\n"a, b"\t"one\n""two"""\nc\td\n'
    assert values(rows(file(tabs, "a.tsv"))) == want


def test_a_row_of_too_many_cells_is_named(file):
    assert shown(rows(file("a,b\n1,2,3\n1,2\n", "a.csv")))[0] == ("a.csv line 2", "more cells than the header names")


def test_a_quote_that_never_ends_takes_no_rows_with_it(file):
    with pytest.raises(ConfigError, match=r"a\.csv line 4 is not CSV"):
        list(rows(file('a,b\n1,2\n"1,2\n3,4\n', "a.csv")))


TABLE = [{"messages": [{"role": "user", "content": f"{n}", "tool_calls": None}]} for n in range(150)]


def test_tables_of_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(TABLE)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        found = list(rows(TextFile(name, lambda name=name: tmp_path / name)))
        assert found == [(f"{name} row {number}", row) for number, row in enumerate(TABLE, 1)]
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30] + b"x" * 10)
        with pytest.raises(ConfigError, match=rf"{re.escape(name)} is damaged"):
            list(rows(TextFile(name, lambda name=name: tmp_path / name)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_without_its_library_says_what_to_install(file, monkeypatch, name):
    for part in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, part, None)
    said = f"{name} is a table of Arrow: run `pip install -e '.[parquet]'`"
    with pytest.raises(UnavailableError, match=re.escape(said)):
        list(rows(file(b"PAR1", name)))


SUFFIXES = {"a.jsonl": ".jsonl", "a.b.JSON.gz": ".json", "a.gz": "", "a": "", "d.x/a.txt.zst": ".txt"}


@pytest.mark.parametrize(("name", "found"), SUFFIXES.items())
def test_suffix_is_that_of_what_is_packed(name, found):
    assert suffix(name) == found
