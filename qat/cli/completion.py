"""What the shell offers at the end of a line: `eval "$(qat -sc install=bash)"`.

Hydra writes the shell's side. Its own answers know neither the words that a key takes nor the runs there
are, and show a key's value in Python's spelling, so lines are answered here, from the schema.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hydra.plugins.completion_plugin import CompletionPlugin

from qat import options
from qat.cli import schema
from qat.cli.arguments import flag_names
from qat.identities import places

RUNS = ("checkpoint", "run.resume")  # keys whose value can be a run of the outputs folder
WORD = re.compile(r"[\w.+-]+")  # words without characters that are special to a shell
SEPARATORS = {"bash": " ", "zsh": " ", "fish": "\n"}


def answer(shell: str, line: str) -> str:
    """The completions of a line, as the shell's function splits them."""
    return SEPARATORS[shell].join(complete(line))


def complete(line: str) -> list[str]:
    """Everything that the last word of a line may become; a word not begun yet may become any setting."""
    before, _, word = line.rpartition(" ")
    folder = re.search(r" (?:--config-dir|-cd)[= ](\S+)", before)
    options.name(folder and os.path.expanduser(folder[1]))
    if word.startswith("-"):
        return [flag for flag in flag_names() if flag.startswith(word)]
    key, equals, value = word.partition("=")
    if not equals:
        return [key[: len(key) - len(key.lstrip("+"))] + name for name in _keys(key.lstrip("+"))]
    listed, comma, last = value.rpartition(",")  # only the last value of a sweep is completed
    return [f"{key}={listed}{comma}{found}" for found in _values(key.lstrip("+"), last)]


def _keys(begun: str) -> list[str]:
    """Keys and groups, down to the next dot: `tr` may become `train.` or `tracker=`."""
    found = set()
    for name in (*(key.name for key in schema.keys().values() if _is_settable(key)), *schema.presets()):
        if name.startswith(begun):
            head, dot, _ = name[len(begun) :].partition(".")
            found.add(begun + head + (dot or "="))
    return sorted(found)


def _is_settable(key: schema.Key) -> bool:
    chosen = key.is_group or key.name in schema.nested()
    return chosen or not (key.is_section or key.name.endswith(".name"))


def _values(name: str, begun: str) -> list[str]:
    if begun.startswith((".", "/", "~")) or "/" in begun:
        return sorted(CompletionPlugin.complete_files(begun))
    return sorted(word for word in _words(name) if word.startswith(begun))


def _words(name: str) -> Iterable[str]:
    """The words that a group or key takes; none for numbers and text."""
    if name in RUNS:
        yield from (run_id for run_id, _ in places(Path("outputs")) if WORD.fullmatch(run_id))
    name = schema.nested().get(name, name)
    if name in (*schema.groups(), *schema.presets()):
        yield from (option.stem for option in options.files(name))
        return
    key = schema.keys().get(name)
    if key is not None and key.words():
        yield from key.words()
    elif key is not None and key.type is bool:
        yield from ("false", "true")
