"""What others hand over is data: a recorded run is read as values of our own keys, and nothing in it is run.

Hydra does what a configuration says: it makes any `_target_`, calls callbacks, and fills in `${oc.env:…}`. So a
recorded run is no file of Hydra's. It is read here, against the schema of `qat.config`, and what holds is offered to
Hydra as values.
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat import older, references
from qat.cli import schema, words
from qat.config import Config, as_plain
from qat.config.keys import under
from qat.errors import ConfigError
from qat.identities import RESOLVED
from qat.installation import command
from qat.suggest import did_you_mean

FILE = f"{RESOLVED}.yaml"
LARGEST = 256_000  # allowed bytes of a recorded configuration; an ordinary one has 3,000
DEEPEST = 16  # allowed levels of nesting in a recorded configuration; ordinary ones have 4
DEFAULTS = ["schema", "_self_", {"override hydra/job_logging": "qat"}, {"override hydra/hydra_logging": "qat"}]
HEADER = f"""\
# This run, whole. To repeat it:
#   %s --config-path <this folder> --config-name {RESOLVED}
{yaml.safe_dump({"defaults": DEFAULTS}, sort_keys=False)}
"""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_meant(flags: dict[str, Any]) -> bool:
    """True where the flags of a command line name a recorded run."""
    return bool(flags.get("config_path")) and flags.get("config_name") == RESOLVED


def written(config: Config) -> str:
    """The whole configuration as the file that repeats a run."""
    return HEADER % command() + OmegaConf.to_yaml(OmegaConf.create(_texts(as_plain(config), references.escaped)))


def read(file: Path) -> dict[str, Any]:
    """The sections of a recorded configuration, with text that holds `${` just as it was.

    Raises:
        ConfigError: it cannot be read, or holds anything but values of our own keys.
    """
    return dict(_texts(offered(file), references.unescaped))


def offer(sections: dict[str, Any], replaced: Collection[str]) -> None:
    """Lets Hydra compose a recorded configuration, under the name that its file has.

    Args:
        sections: of the configuration, as `offered` reads them.
        replaced: groups of which an option is chosen. What was recorded of them goes, as nothing that is merged with a
            mapping takes an entry out of it.
    """
    kept = {name: section for name, section in sections.items() if name not in replaced}
    ConfigStore.instance().store(name=RESOLVED, node=OmegaConf.create({"defaults": DEFAULTS, **kept}))


def offered(file: Path) -> dict[str, Any]:
    """The sections of a recorded configuration, for Hydra.

    Raises:
        ConfigError: as `read`.
    """
    text = _text(file)
    try:
        _check_form(text, file)
        content = words.as_text(text, Config) if text.strip() else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not content:
        raise ConfigError(f"{file} is empty: name the folder of a run that recorded its configuration")
    if any(default not in DEFAULTS for default in _listed(content.pop("defaults", []))):
        raise _foreign(file, "defaults")
    for key in _strange(content, Config, ""):
        raise _foreign(file, key)
    older.settings(content)
    return content


def _text(file: Path) -> str:
    if not os.path.isfile(file):
        raise ConfigError(f"{file} is not there, or no file: name the folder of a run, which has a {file.name}")
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{file} is larger than any recorded configuration, {LARGEST:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text, at byte {error.start}") from None


def _check_form(text: str, file: Path) -> None:
    """Refuses tags, aliases and deep nesting, which could create objects or use much memory when read."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _foreign(file, f"the alias {event.anchor}")
        if getattr(event, "tag", None):
            raise _foreign(file, f"the tag {event.tag}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{file}: more than {DEEPEST} levels lie within each other, which no run records")


def _strange(value: Any, hint: Any, key: str) -> Iterator[str]:
    """Keys that do not exist here or hold a value of another kind, such as a section or a reference."""
    if isinstance(value, dict):
        for name, part in value.items():
            inner, below = f"{key}.{name}".lstrip("."), under(hint, name)
            yield from [inner] if below is None else _strange(part, below, inner)
    elif isinstance(value, list):
        for part in value:
            yield from _strange(part, words.inside(hint), key)
    elif isinstance(value, str) and references.is_live(value):
        yield f"{key}={value}"


def _foreign(file: Path, what: str) -> ConfigError:
    known = did_you_mean(what, schema.keys()) if re.fullmatch(r"[\w.]+", what) else ""
    return ConfigError(f"{file} holds {what}{known}: of a recorded run only values of our own keys are read")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any, change: Any) -> Any:
    """A tree of plain values with every text changed."""
    if isinstance(value, dict):
        return {key: _texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
