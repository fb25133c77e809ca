"""Why a key cannot be set that lies in a section which is null, and which option has the section."""

from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf

from qat.cli import schema
from qat.options import files


def around(override: str) -> list[str]:
    """Sections around what an override sets that may be null, the outermost first; itself where it is one."""
    name, _, value = override.lstrip("+").partition("=")
    parts = name.split(".")
    sections = [".".join(parts[:count]) for count in range(1, len(parts) + value.startswith("{"))]
    return [section for section in sections if NoneType in get_args(schema.hint(section)) and _is_section(section)]


def whole(name: str) -> bool:
    """Whether a key is a section that may be null, whose keys can all be given in braces."""
    groups_inside = any(inside.startswith(f"{name}.") for inside in schema.nested())
    return NoneType in get_args(schema.hint(name)) and _is_section(name) and not groups_inside


def lacking(override: str, composed: DictConfig) -> str | None:
    """What a configuration lacks for an override, and what to choose; None where it has all sections.

    Args:
        override: as typed.
        composed: all the rest.
    """
    section = next((name for name in around(override) if OmegaConf.select(composed, name) is None), None)
    if section is None:
        return None
    key = override.lstrip("+").partition("=")[0]
    return f"{key} cannot be set, {section} is null: {_remedy(section, composed)}"


def _remedy(section: str, composed: DictConfig) -> str:
    inside = [name for name in schema.nested() if name.startswith(f"{section}.")]
    if inside:
        setting = [path for path in _presets() if f"@{section}." in path.read_text("utf-8", errors="replace")]
        presets = [f"+{path.parent.name}={path.stem}" for path in setting]
        return f"say {' '.join(f'{name}=<option>' for name in inside)} as well, or {' or '.join(presets)}, which does"
    if section in schema.nested():
        known = [path.stem for path in files(schema.nested()[section])]
        return f"say {section}=<option> as well, one of {', '.join(known)}"
    place, _, part = section.rpartition(".")
    group = schema.nested().get(place, place)
    having = [path.stem for path in files(group) if _values(path).get(part)]
    whole = f"give it whole, '{section}={{bits: 4, rank: 8}}'"
    if having:
        chosen = f"{place}={OmegaConf.select(composed, place).name}"
        return f"{chosen} has none, these do: {', '.join(having)}; or {whole}"
    return whole


def _values(option: Path) -> dict[str, Any]:
    """What an option sets; nothing for a file of a person's own that cannot be read, of which composing it tells."""
    try:
        found = yaml.safe_load(option.read_text("utf-8", errors="replace"))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _presets() -> list[Path]:
    return [path for group in schema.presets() for path in files(group)]


def _is_section(name: str) -> bool:
    return bool(schema.hints(schema.hint(name)))
