"""Reads runs' files tolerantly: a log must be able to list a run whose files are damaged."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat import bounded
from qat.identities import NUMBERED, PLAN, RESULT, identity, places

LONGEST = 20_000  # maximum characters of a text
LARGEST = 1e15  # maximum of a figure; the largest ones are bytes of files
NEWEST = 50  # runs looked at for one that is like another; a record may have 100,000 bytes
STATUSES = ("complete", "failed", "interrupted")
# What two runs have in common whose parts take about as long.
ALIKE = (
    ("stage",),
    ("config", "model", "name"),
    ("config", "quant", "name"),
    ("environment", "device"),
    ("environment", "cores"),
)
# Keys of the KD loss in the description of a conversion, of a trained student, and of the older scripts' files.
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
        return identity(self.result.get("run_id")) or self.folder.name

    @property
    def status(self) -> str:
        """`complete`, `failed`, `interrupted`, or `unreadable`."""
        status = self.result.get("status")
        return status if status in STATUSES else "unreadable"

    @property
    def sweep(self) -> str:
        """The sweep it is a job of, or nothing."""
        parent = self.place.rpartition("/")[0]
        return parent if parent.startswith("sweep-") or os.path.isfile(self.folder.parent / PLAN) else ""

    @property
    def is_trial(self) -> bool:
        """True for a run that makes a student, or was to make one; an evaluation or an export looks at one."""
        return self.text("stage") not in ("cache", "evaluate", "export")

    @property
    def trains(self) -> bool:
        """True for a run whose figures are of a student that it trained, or was to train."""
        return self.is_trial and self.text("stage") != "convert"

    @property
    def came_to_nothing(self) -> bool:
        """True for a run that was refused, or failed, before it made or measured anything."""
        return self.status == "failed" and not self.section("metrics") and not self.result.get("made")

    @property
    def ground(self) -> tuple[str, str]:
        """The teacher and text of its figures; only figures with the same teacher and text can be compared."""
        named = self.text("config", "teacher", "name") or self.text("config", "model", "name")
        teacher = self.text("measured_on", "teacher", "fingerprint") or named
        return teacher, self.text("measured_on", "text") or Path(self.text("paths", "cache")).name

    def text(self, *keys: str) -> str:
        """A value of the result as text; empty where there is none."""
        value = self._value(keys)
        said = "" if value is None or isinstance(value, dict | list) else str(value)
        return said if len(said) <= LONGEST else said[:LONGEST] + "…"

    def number(self, *keys: str) -> float | None:
        """A number of the result; None where there is none, or one that no figure is as large as."""
        value = self._value(keys)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        return value if usable else None

    def numbers(self, *keys: str) -> dict[str, float]:
        """The positive numbers of a part of the result, by name."""
        found = {name: self.number(*keys, name) for name in self.section(*keys)}
        return {name: value for name, value in found.items() if value is not None and value > 0}

    def seconds(self, *keys: str) -> float | None:
        """A time of the result; None where there is none."""
        value = self.number(*keys)
        return value if value is not None and value >= 0 else None

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
    return Record(folder, bounded.said(folder / RESULT), _place(folder, outputs))


def runs(outputs: Path) -> list[Record]:
    """Every run of an outputs folder, in the order of their identities."""
    records = [read(folder, outputs) for _, folder in places(outputs) if os.path.isfile(folder / RESULT)]
    return sorted(records, key=lambda record: (_number(record.run_id), record.place))


def last_like(outputs: Path, result: dict[str, Any]) -> Record | None:
    """The newest complete run of the same stage, teacher, preset, device and cores as the one of a `result.json`."""
    own = Record(outputs, result, "")
    folders = sorted(places(outputs), key=lambda place: _number(place[0]))[-NEWEST:]
    for _, folder in reversed(folders):
        earlier = read(folder, outputs) if os.path.isfile(folder / RESULT) else None
        if earlier and earlier.status == "complete" and all(earlier.text(*key) == own.text(*key) for key in ALIKE):
            return earlier
    return None


def manifests(outputs: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Place and description of every artifact and every pulled archive of a kind, `caches` or `checkpoints`.

    What the older scripts made describes itself in a `config.json` or `meta.json`, maybe a folder deeper.
    """
    folders = [path for parent in (outputs / "artifacts" / kind, outputs / kind) for path in _folders(parent)]
    return [(folder.relative_to(outputs).as_posix(), _described(folder)) for folder in folders]


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    files = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(file).st_size for file in files if os.path.isfile(file) and not os.path.islink(file))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without those that a kill cut short."""
    return list(bounded.rows(folder / "metrics.jsonl"))


def samples(folder: Path) -> list[dict[str, Any]]:
    """The prompts of `samples.md`, each with the answer of every model: `{"prompt": …, "answers": {name: text}}`."""
    text = bounded.text(folder / "samples.md")
    return [_sample(part) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]


def _sample(part: str) -> dict[str, Any]:
    prompt, _, rest = part.partition("\n")
    said = re.findall(r"^\*\*(.+?)\*\*\n\n((?:>.*(?:\n|$))*)", rest, re.MULTILINE)
    answers = {name: "\n".join(line[1:].strip() for line in quoted.splitlines()) for name, quoted in said}
    return {"prompt": prompt.strip(), "answers": answers}


def _place(folder: Path, outputs: Path) -> str:
    return (folder.relative_to(outputs) if folder.is_relative_to(outputs) else folder).as_posix()


def _described(folder: Path) -> dict[str, Any]:
    names = ("manifest.json", "config.json", "meta.json")
    found = (path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}"))))
    return next((said for path in found if (said := bounded.said(path))), {})


def _folders(parent: Path) -> Iterator[Path]:
    yield from sorted(path for path in parent.glob("[!.]*") if os.path.isdir(path))


def _number(run_id: str) -> tuple[int, str]:
    match = NUMBERED.fullmatch(run_id)
    return (int(match[1]) if match else 10**9, run_id)
