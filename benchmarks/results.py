"""Rows of a comparison: kept as JSON and printed as a table."""

import json
from pathlib import Path
from typing import Any

from qat.artifacts import write_json
from qat.errors import ArtifactError

OURS = "ours"
SEEDS_OF_A_RECORD = 3  # fewer do not tell a gain from chance


class Results:
    """Rows in a JSON file, written after each; one a method, name and text. Several commands may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows that are there now.

        Raises:
            ArtifactError: the file is not what this script writes.
        """
        try:
            rows = json.loads(self.path.read_text()) if self.path.exists() else []
            for row in rows:
                _place(row)
            return rows
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.path} does not hold rows of this script ({error!r}): mend or delete it"
            ) from None

    def has(self, row: dict[str, Any]) -> bool:
        """True where this row is there, made with the same settings."""
        return any(_place(old) == _place(row) and old["settings"] == row["settings"] for old in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Puts a row in, in place of an older one of the same method, name and text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, [old for old in self.rows if _place(old) != _place(row)] + [row])

    def merge(self, others: "Results") -> None:
        """Adds all rows of another file.

        Raises:
            ArtifactError: there is no such file, or it is not what this script writes.
        """
        if not others.path.exists():
            raise ArtifactError(f"{others.path}: no such file")
        for row in others.rows:
            self.add(row)


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["name"], row["text"]


def table(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown: a line a model in order of size, a column a text, then what could not run and why."""
    names = sorted({row["text"] for row in rows})
    heads = ["method", "", "MB", "bits a weight", "bits on the MLP", *(f"{name} KL" for name in names), "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    models: dict[tuple[float, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["megabytes"], row["method"], row["name"]), {})[row["text"]] = row
    for (size, method, name), by_text in sorted(models.items()):
        told = next(iter(by_text.values()))
        kl = " | ".join(shown(by_text[text]) if text in by_text else "" for text in names)
        figures = f"{size:.1f} | {told['bits_model']:.2f} | {told['bits']:.2f} | {kl}"
        lines.append(f"| {method} | {name} | {figures} | {told.get('seconds', '')} |")
    return "\n".join([*lines, *(f"\n{label} was left out: {reason}" for label, reason in skipped.items())])


def shown(row: dict[str, Any], figure: str = "kl") -> str:
    """A figure; of several seeds their mean and standard deviation."""
    spread = f" ± {row['deviation'][figure]:.3f}" if "deviation" in row else ""
    return f"{row[figure]:.3f}{spread}"
