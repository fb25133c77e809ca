"""docs/RELIABILITY.md names a test for every fault: each of them exists."""

import ast
import re
from pathlib import Path

import pytest

from tests import parsed

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
FAULTS = TEXT.partition("\n## ")[0].splitlines()
ROWS = [line.strip("|").split(" | ") for line in FAULTS if line.startswith("| ")][2:]


def functions(file: Path) -> list[str]:
    tree = parsed.tree(file)
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_every_fault_has_its_tests(row):
    fault, *_, said = row
    assert len(row) == 4, fault
    named = re.findall(r"`(tests/[^`]+)`", said)
    assert named, fault
    for name in named:
        file, _, test = name.partition("::")
        found = functions(ROOT / file)
        assert found, name
        if test.endswith("…"):
            assert any(one.startswith(test.rstrip("…")) for one in found), name
        elif test:
            assert test in found, name


def test_the_table_is_long():
    assert len(ROWS) >= 18
