"""What of a configuration can change what comes of a run; everything else may differ without a word.

The fields of `qat.config` say it of themselves. Keys of artifacts, plans of sweeps and runs that are gone on
with all ask here, so that a key which shapes a result can be forgotten nowhere.
"""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from qat.config import NEUTRAL, OF_STAGE, Config, as_plain


def shaping(section: Any) -> dict[str, Any]:
    """A configuration, or a section of one, as JSON values, without what never changes a result.

    That is what is neutral, and of a whole configuration the sections that belong to another stage than its own.
    """
    stage = getattr(section, "stage", None)
    own = [field for field in fields(section) if field.metadata.get(OF_STAGE, stage) is stage]
    return {field.name: _plain(getattr(section, field.name)) for field in own if not _is_neutral(field)}


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
        if found is None or _is_neutral(found):
            return found is not None
        hint = get_type_hints(section)[part]
        section = next(iter(get_args(hint)), hint)
        if not is_dataclass(section):
            break
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return shaping(value) if is_dataclass(value) else as_plain(value)


def _is_neutral(field: "Field[Any]") -> bool:
    return bool(field.metadata.get(NEUTRAL))
