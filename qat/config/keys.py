"""A key says everything about itself in one place: what it is, what it takes, and whether it can change a result.

Help, CONFIG.md, completion, the checks of values and the keys of artifacts read it here, so a new key is one line.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

COLD, HOT = 0.01, 1000  # temperatures: beyond, a softmax in fp32 is one token or all alike
_SAID = "said"  # where a field of a dataclass keeps what is said of it


@dataclass(frozen=True)
class Bound:
    """The numbers a key takes: from `low` to `high`, or strictly between `above` and `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """True for a finite number inside."""
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """The bound in words; nothing where every number is inside."""
        ends = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {end}" for word, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class Said:
    """What a field says of itself, as `key` and `section` take it."""

    comment: str = ""
    bound: Bound = Bound()
    words: tuple[str, ...] = ()
    prose: bool = False
    neutral: bool = False
    stage: Enum | None = None


def key(
    default: T, comment: str, *, words: tuple[str, ...] = (), prose: bool = False, neutral: bool = False, **ends: float
) -> T:
    """A field that holds a value.

    Args:
        default: taken where nothing sets it; MISSING where an option must.
        comment: what it is, in the words of the command line.
        words: of a text, the only ones it takes.
        prose: a sentence, in which a comma separates no values.
        neutral: the value never changes what comes of a run.
        ends: of a number, as `Bound` has them: low, high, above, below.
    """
    said = Said(comment, Bound(**ends), words, prose, neutral)
    made: Any = _field(default, said)
    return made


def section(kind: type[T], *, neutral: bool = False, stage: Enum | None = None) -> T:
    """A field that holds a section of keys; one that is null unless it is set is a `key` instead.

    Args:
        kind: its dataclass, whose docstring opens with what it is.
        neutral: nothing in it ever changes what comes of a run.
        stage: the only one whose result it can change.
    """
    made: Any = field(default_factory=kind, metadata={_SAID: Said(neutral=neutral, stage=stage)})
    return made


def like(owner: type, name: str, default: Any = None) -> Any:
    """A field of which the same is to be said as of another; null leaves it as the other has it."""
    return _field(default, said(next(found for found in fields(owner) if found.name == name)))


def said(found: "Field[Any]") -> Said:
    """What a field says of itself; nothing where it was made without `key` and `section`."""
    return found.metadata.get(_SAID, Said())


def hints(kind: Any) -> dict[str, Any]:
    """The annotation of each field of a section, optional or not; none for what is no section."""
    kind = required(kind)
    return _hints(kind) if hasattr(kind, "__dataclass_fields__") else {}


def under(kind: Any, name: str) -> Any:
    """The annotation of what a section or a mapping has under a name; None where nothing can be."""
    kind = required(kind)
    return get_args(kind)[1] if get_origin(kind) is dict else hints(kind).get(name)


def required(hint: Any) -> Any:
    """`int` for `int | None`; anything else as it is."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    return parts[0] if NoneType in get_args(hint) else hint


@dataclass(frozen=True)
class Value:
    """A value of a configuration and where it stands: `train.lr`, or `data.parts[0].weight` in a list of sections."""

    name: str
    value: Any
    field: "Field[Any]"
    owner: Any

    @property
    def said(self) -> Said:
        """What its field says."""
        return said(self.field)


def values(config: Any, prefix: str = "") -> Iterator[Value]:
    """Every value of a section and the sections in it, in the order of their fields."""
    for found in fields(config):
        name, value = prefix + found.name, getattr(config, found.name)
        if is_dataclass(value):
            yield from values(value, f"{name}.")
        elif isinstance(value, list | dict) and any(map(is_dataclass, _entries(value).values())):
            for place, entry in _entries(value).items():
                yield from values(entry, f"{name}[{place}].") if is_dataclass(entry) else ()
        else:
            yield Value(name, value, found, config)


def as_plain(config: Any) -> Any:
    """A dataclass tree as dicts, strings and numbers (enums by name), ready for JSON."""
    if isinstance(config, Enum):
        return config.name
    if hasattr(config, "__dataclass_fields__"):
        return {name: as_plain(getattr(config, name)) for name in config.__dataclass_fields__}
    if isinstance(config, dict):
        return {name: as_plain(entry) for name, entry in config.items()}
    if isinstance(config, list):
        return [as_plain(entry) for entry in config]
    return config


def _entries(value: "list[Any] | dict[str, Any]") -> dict[Any, Any]:
    """A list's values by their number, those of a mapping by their name."""
    return value if isinstance(value, dict) else dict(enumerate(value))


def _field(default: Any, said: Said) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={_SAID: said})
    return field(default=default, metadata={_SAID: said})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
