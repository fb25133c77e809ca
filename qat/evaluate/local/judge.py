"""Rows of the local tasks, and what a program can tell of an answer; lm-eval reads this file by its YAML files."""

import json
import re
from pathlib import Path
from typing import Any

CHECKS = {
    "contains": lambda said, value: all(part.lower() in said.lower() for part in value),
    "any": lambda said, value: any(part.lower() in said.lower() for part in value),
    "without": lambda said, value: bool(said) and not any(part.lower() in said.lower() for part in value),
    "equals": lambda said, value: said.rstrip(".!") == value,
    "starts": lambda said, value: said.lower().startswith(value),
    "ends": lambda said, value: said.rstrip(".!").lower().endswith(value),
    "words": lambda said, value: 0 < len(said.split()) <= value,
    "lines": lambda said, value: len(_lines(said)) == value,
    "each": lambda said, value: all(line.startswith(value) for line in _lines(said)),
    "sentences": lambda said, value: len(re.findall(r"[.!?](?=\s|$)", said)) == value,
    "lower": lambda said, _: said.islower(),
    "upper": lambda said, _: said.isupper(),
    "json": lambda said, value: set(_object(said)) == set(value),
}


def rows(name: str, **_: Any) -> Any:
    """The rows of a task, as the harness takes a data set."""
    from datasets import Dataset

    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([{"row": line} | _texts(json.loads(line)) for line in lines])}


def follows(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 where an answer passes every check of its row, else 0."""
    said = answers[0].strip()
    checks = json.loads(row["row"])["checks"]
    return {"acc": float(all(CHECKS[one["check"]](said, one["value"]) for one in checks))}


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    """What the YAML files name; checks differ in their types, so they stay in the line."""
    return {key: value for key, value in row.items() if key != "checks"}


def _lines(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if line.strip()]


def _object(said: str) -> dict[str, Any]:
    """A JSON object, with or without the fence that models put around one; nothing where there is none."""
    try:
        found = json.loads(re.sub(r"^```(?:json)?|```$", "", said).strip())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
