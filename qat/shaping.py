"""The settings that can change a run's result; all others may differ without notice.

The fields of `qat.config` say it of themselves. Keys of artifacts, plans of sweeps and runs that are gone on
with all ask here, so that a key which shapes a result can be forgotten nowhere.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from qat.config import Config, as_plain
from qat.config.keys import hints, required, said


def shaping(section: Any) -> dict[str, Any]:
    """A configuration, or a section of one, as JSON values, without what never changes a result.

    That is what is neutral, and of a whole configuration the sections that belong to another stage than its own.
    """
    stage = getattr(section, "stage", None)
    own = [field for field in fields(section) if said(field).stage in (None, stage) and not said(field).neutral]
    return {field.name: _plain(getattr(section, field.name)) for field in own}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted key."""
    if not isinstance(tree, dict):
        yield prefix[:-1], tree
        return
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.")


def is_neutral(name: str) -> bool:
    """True for a key, or the group of an option, that never changes a result, whatever the stage."""
    section: Any = Config
    for part in name.split("."):
        found = next((field for field in fields(section) if field.name == part), None)
        if found is None or said(found).neutral:
            return found is not None
        section = required(hints(section)[part])
        if not is_dataclass(section):
            break
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return shaping(value) if is_dataclass(value) else as_plain(value)
