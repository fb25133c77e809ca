"""Rooms know what is below them, as docs/ARCHITECTURE.md draws it, and no two know each other."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import parsed

ROOT = Path(__file__).parents[1]
QAT = ROOT / "qat"


def rooms_below(file: Path) -> Iterator[str]:
    """The rooms that a file imports from, at its top or inside a function."""
    for node in parsed.nodes(file):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "qat" and rest and room_of(rest[0]):
                yield rest[0]


def room_of(name: str) -> bool:
    return (QAT / name).is_dir() or (QAT / f"{name}.py").is_file()


@pytest.fixture(scope="module")
def below() -> dict[str, set[str]]:
    """What each room imports from."""
    found: dict[str, set[str]] = {}
    for file in QAT.rglob("*.py"):
        room = file.relative_to(QAT).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(set(rooms_below(file)) - {room})
    return found


@pytest.fixture(scope="module")
def line_of() -> dict[str, int]:
    """The line of the picture in which each room is, from the top."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = text.partition("## What may import what")[2].split("```")[1].strip("\n")
    lines = re.sub(r"\n {15}", " ", drawn).splitlines()
    return {room: number for number, line in enumerate(lines) for room in re.split(r"[, ]+", line[15:].strip())}


def test_every_room_is_drawn_and_none_that_is_not_there(below, line_of):
    assert set(line_of) == set(below)


def test_imports_point_down(below, line_of):
    upwards = {(room, other) for room, others in below.items() for other in others if line_of[other] < line_of[room]}
    assert not upwards


def test_no_rooms_know_each_other(below):
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of rooms: {' -> '.join(error.args[1])}")


def test_one_file_reads_what_torchrun_says():
    said = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"}
    reading = {
        file.relative_to(QAT).as_posix()
        for file in QAT.rglob("*.py")
        for node in parsed.nodes(file)
        if isinstance(node, ast.Constant) and node.value in said
    }
    assert reading == {"processes.py"}
