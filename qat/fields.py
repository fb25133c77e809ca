"""Rules for values in files. They are checked once, when the file is read, so that all other code can rely on them.

A rule is called with a value and the name under which a message speaks of it, such as `layers.q_proj.bits`.
"""

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

LARGEST = 2**63 - 1  # maximum of a 64-bit signed integer
NAME = 4096  # maximum characters of a text that names something

Rule = Callable[[Any, str], None]


class Wrong(ValueError):
    """A value that breaks a rule; the text says which, what it is and what belongs there."""


def whole(low: int = 0, high: int = LARGEST) -> Rule:
    """A whole number, both ends included."""
    ends = f"from {low} to {high}" if high < LARGEST else f"of at least {low}"

    def look(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(where, value, f"a whole number {ends}")

    return look


def number(finite: bool = True) -> Rule:
    """A number; with `finite`, neither NaN nor infinite."""

    def look(value: Any, where: str) -> None:
        if type(value) not in (int, float) or (finite and not abs(value) < math.inf):
            raise _wrong(where, value, "a finite number" if finite else "a number")

    return look


def truth(value: Any, where: str) -> None:
    """A rule: true or false."""
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")


def text(value: Any, where: str) -> None:
    """A rule: a text that names something."""
    if not isinstance(value, str) or len(value) > NAME:
        raise _wrong(where, value, "a text")


def matching(pattern: str, what: str) -> Rule:
    """A text of a form."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise _wrong(where, value, what)

    return look


def one_of(*options: str) -> Rule:
    """One of some words."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in options:
            raise _wrong(where, value, f"one of {', '.join(options)}")

    return look


def optional(rule: Rule) -> Rule:
    """As the rule, or null."""

    def look(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return look


def several(*rules: Rule) -> Rule:
    """A list with a value for each rule."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(rules):
            raise _wrong(where, value, f"a list of {len(rules)}")
        for place, (rule, item) in enumerate(zip(rules, value, strict=True)):
            rule(item, f"{where}[{place}]")

    return look


def mapping(names: Rule, rule: Rule, least: int = 0) -> Rule:
    """An object with any names that keep to a rule, each with a value that keeps to another."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) < least:
            raise _wrong(where, value, "an object that is not empty" if least else "an object")
        for name, item in value.items():
            names(name, f"a name in {where}")
            rule(item, _below(where, name))

    return look


def record(needed: dict[str, Rule], besides: dict[str, Rule] | None = None) -> Rule:
    """An object with required and optional fields; further fields are ignored."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for name, rule in needed.items():
            if name not in value:
                raise Wrong(f"{_below(where, name)} is missing")
            rule(value[name], _below(where, name))
        for name, rule in (besides or {}).items():
            if name in value:
                rule(value[name], _below(where, name))

    return look


def _below(where: str, name: str) -> str:
    shown = ascii(name[:NAMED])[1:-1]
    return f"{where}.{shown}" if where else shown


NAMED = 200  # maximum characters of a name that a message shows
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def _wrong(where: str, value: Any, wanted: str) -> Wrong:
    shown = ascii(_short.repr(value))[1:-1]
    return Wrong(f"{where} is {shown}, and {wanted} belongs there")
