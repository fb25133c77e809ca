"""Reads what runs left, tolerantly: a log must be able to tell of a run whose files are damaged."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.identities import PLAN, RESULT, places

STATUSES = ("complete", "failed", "interrupted")
# Where a checkpoint's own description gives its KD loss: of a conversion, of a student, of the older scripts.
LOSSES = (("metrics", "after", "kd_loss"), ("kd_loss_best",), ("final_loss",))


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: where it lies.
        result: the content of its `result.json`; empty where that cannot be read.
        place: its folder relative to the outputs folder, with forward slashes; the whole path of one elsewhere.
    """

    folder: Path
    result: dict[str, Any]
    place: str

    @property
    def run_id(self) -> str:
        """`SR-007`."""
        return str(self.result.get("run_id") or self.folder.name)

    @property
    def status(self) -> str:
        """`complete`, `failed`, `interrupted`, or `unreadable`."""
        status = self.result.get("status")
        return status if status in STATUSES else "unreadable"

    @property
    def sweep(self) -> str:
        """The sweep it is a job of, or nothing."""
        parent = self.place.rpartition("/")[0]
        return parent if parent.startswith("sweep-") or (self.folder.parent / PLAN).is_file() else ""

    @property
    def is_trial(self) -> bool:
        """True for a run that makes a student, or was to make one; an evaluation or an export looks at one."""
        return self.text("stage") not in ("cache", "evaluate", "export")

    @property
    def ground(self) -> tuple[str, str]:
        """The teacher and the text that its figures are of: only those of one ground compare."""
        teacher = self.text("measured_on", "teacher", "fingerprint") or self.text("config", "model", "name")
        return teacher, self.text("measured_on", "text") or Path(self.text("paths", "cache")).name

    def text(self, *keys: str) -> str:
        """A value of the result as text; empty where there is none."""
        value = self._value(keys)
        return "" if value is None or isinstance(value, dict | list) else str(value)

    def number(self, *keys: str) -> float | None:
        """A finite number of the result; None where there is none."""
        value = self._value(keys)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return value if usable else None

    def first(self, *keys: tuple[str, ...]) -> float | None:
        """The first of several numbers that the result has."""
        return next((number for path in keys if (number := self.number(*path)) is not None), None)

    def section(self, *keys: str) -> dict[str, Any]:
        """A part of the result; empty where there is none."""
        value = self._value(keys)
        return value if isinstance(value, dict) else {}

    def _value(self, keys: tuple[str, ...]) -> Any:
        value: Any = self.result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read(folder: Path, outputs: Path) -> Record:
    """The record in a run's folder, which may have been chosen to lie outside of `outputs`."""
    return Record(folder, _json(folder / RESULT), _place(folder, outputs))


def runs(outputs: Path) -> list[Record]:
    """Every run of an outputs folder, in the order of their identities."""
    records = [read(folder, outputs) for _, folder in places(outputs) if (folder / RESULT).is_file()]
    return sorted(records, key=lambda record: (_number(record.run_id), record.place))


def manifests(outputs: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Place and description of every artifact and every pulled archive of a kind, `caches` or `checkpoints`.

    What the older scripts made describes itself in a `config.json` or `meta.json`, maybe a folder deeper.
    """
    folders = [path for parent in (outputs / "artifacts" / kind, outputs / kind) for path in _folders(parent)]
    return [(folder.relative_to(outputs).as_posix(), _described(folder)) for folder in folders]


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without those that a kill cut short."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [row for row in map(_parsed, lines) if isinstance(row, dict)]


def samples(folder: Path) -> list[dict[str, Any]]:
    """The prompts of `samples.md`, each with the answer of every model: `{"prompt": …, "answers": {name: text}}`."""
    try:
        text = (folder / "samples.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [_sample(part) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]


def _sample(part: str) -> dict[str, Any]:
    prompt, _, rest = part.partition("\n")
    said = re.findall(r"^\*\*(.+?)\*\*\n\n((?:>.*(?:\n|$))*)", rest, re.MULTILINE)
    answers = {name: "\n".join(line[1:].strip() for line in quoted.splitlines()) for name, quoted in said}
    return {"prompt": prompt.strip(), "answers": answers}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _place(folder: Path, outputs: Path) -> str:
    return (folder.relative_to(outputs) if folder.is_relative_to(outputs) else folder).as_posix()


def _described(folder: Path) -> dict[str, Any]:
    names = ("manifest.json", "config.json", "meta.json")
    found = (path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}"))))
    return next((said for path in found if (said := _json(path))), {})


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _number(run_id: str) -> tuple[int, str]:
    digits = run_id.rpartition("-")[2]
    return (int(digits) if digits.isdecimal() else 10**9, run_id)
