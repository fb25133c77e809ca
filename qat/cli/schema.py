"""The keys of a run, read off the dataclasses in `qat.config`, so that nothing is listed twice."""

import inspect
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore

from qat import options
from qat.config import Config
from qat.config.keys import Said, hints, required, said

# Groups of the package without a default option: presets that set options of several other groups.
EXTRAS = ("experiment", "debug")


@dataclass(frozen=True)
class Key:
    """One key of the command line: `train.lr` holds a value, `train` a section of them."""

    name: str
    type: type
    default: Any
    said: Said

    @property
    def comment(self) -> str:
        """The key's description; without a comment, that of the class of its section or list of words."""
        return self.said.comment or _summary(self.type)

    @property
    def is_section(self) -> bool:
        """True for a key that has keys below it."""
        return is_dataclass(self.type)

    @property
    def is_group(self) -> bool:
        """True for a section that every run has, chosen by option, as in `quant=q2a4`."""
        optional = NoneType in get_args(hint(self.name))
        return self.is_section and not optional and "." not in self.name and "name" in hints(self.type)

    def words(self) -> dict[str, str]:
        """The only words it takes, with their meanings where given; empty for numbers and free text."""
        if issubclass(self.type, Enum):
            return {choice.name: choice.value for choice in self.type}
        return dict.fromkeys(self.said.words, "")

    def kind(self) -> str:
        """The type in words a user knows."""
        if words := self.words():
            return "one of " + ", ".join(words)
        known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        known |= {list: "a list", dict: "a mapping", Any: "text or a list of texts"}
        return known.get(self.type, "a section of keys")

    def takes(self) -> str:
        """The values it takes: `a number, above 0`."""
        return ", ".join(filter(None, [self.kind(), str(self.said.bound)]))


@cache
def keys() -> dict[str, Key]:
    """Every key by its dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


@cache
def groups() -> tuple[str, ...]:
    """Groups that every run has an option of."""
    return tuple(key.name for key in keys().values() if key.is_group)


def presets() -> tuple[str, ...]:
    """Groups that a run has an option of only if it is asked for: the package's, and those of a person's own."""
    return (*EXTRAS, *(group for group in options.groups() if group not in (*EXTRAS, *groups())))


@cache
def nested() -> dict[str, str]:
    """Other sections that take a group's options, each with the group: `first.quant` those of `quant`."""
    types = {keys()[group].type: group for group in groups()}
    return {key.name: types[key.type] for key in keys().values() if not key.is_group and key.type in types}


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{written(part)}" for name, part in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def hint(name: str) -> Any:
    """The annotation of a key by its dotted name, Hydra's own below `hydra.` included; None where there is none."""
    found, below = None, {"hydra": HydraConf} | hints(Config)
    for part in name.split("."):
        found = below.get(part)
        below = hints(found)
    return found


@cache
def register() -> None:
    """Makes the schemas known to Hydra, once: `schema` for a whole run, `schema/<group>` for one group."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group in groups():
        store.store(group="schema", name=group, node=keys()[group].type)


def _walk(section: type, prefix: str) -> Iterator[Key]:
    for field in fields(section):
        kind = _kind(hints(section)[field.name])
        yield Key(prefix + field.name, kind, _default(field), said(field))
        if is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")


def _default(field: "Field[Any]") -> Any:
    """What a key holds unless it is set; None for a section."""
    made = field.default_factory() if field.default_factory is not NO_DEFAULT else field.default
    return None if is_dataclass(made) else made


def _kind(hint: Any) -> type:
    """`int` for `int | None`, `list` for a list of anything, `dict` for a mapping to anything."""
    origin = get_origin(hint)
    return origin if origin in (list, dict) else required(hint)


def _summary(kind: type) -> str:
    documented = is_dataclass(kind) or issubclass(kind, Enum)
    return (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".") if documented else ""
