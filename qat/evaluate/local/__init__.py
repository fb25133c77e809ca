"""Tasks for lm-eval that come with the package and need no network: plain questions, written for this project.

    cloze          the last word of a sentence, out of four
    choice         the answer to a question, out of four
    instructions   an answer as asked for, which `judge.py` can tell: so many lines, in capital letters, as JSON

A task is a YAML file with its rows beside it, `local_<name>` to the harness; `lm_eval --tasks <path of the YAML file>`
runs one as well.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

ALL = "local"
NAMES = ("local_cloze", "local_choice", "local_instructions")


def files_of(task: str) -> list[str]:
    """The YAML files of a task by its name, of all for `local`; another task stays as it is."""
    names = _names(task)
    return [str(files("qat.evaluate.local") / f"{name.removeprefix('local_')}.yaml") for name in names] or [task]


def choices(tasks: Sequence[str], examples: int | None = None) -> int | None:
    """The answers that a model weighs in some tasks, at most so many examples of each; None with a task of others."""
    if not all(map(_names, tasks)):
        return None
    names = {name for task in tasks for name in _names(task)}
    return sum(len(row.get("choices", ())) for name in names for row in islice(_rows(name), examples))


def _names(task: str) -> Sequence[str]:
    """The package's tasks that a name stands for; none for a task of others."""
    return NAMES if task == ALL else [task] if task in NAMES else []


def _rows(name: str) -> Iterator[dict[str, Any]]:
    file = files("qat.evaluate.local") / f"{name.removeprefix('local_')}.jsonl"
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())
