"""`run.resume=SR-007`: an interrupted run goes on in its own folder, as what it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qat import names
from qat.config import Config, Stage, as_plain
from qat.errors import ConfigError
from qat.identities import RESOLVED

# What decides where and how fast, who is told and when states are written, but never the result.
FREE = (
    "instance.",
    "tracker.",
    "store.",
    "run.",
    "export.",
    "chat.",
    "evaluate.",
    "outputs",
    "train.save_every",
    "train.keep",
)


def check(config: Config) -> None:
    """The run to go on with is there, and its configuration is this one.

    Raises:
        ConfigError: the run is not there, or the first key that differs.
    """
    name = config.run.resume
    if name is None:
        return
    if config.stage not in (Stage.run, Stage.distill):
        raise ConfigError(f"run.resume={name}: only training goes on, with stage=run or stage=distill")
    file = _folder(config, name) / f"{RESOLVED}.yaml"
    try:
        before = dict(_flat(names.comparable(yaml.safe_load(file.read_text(encoding="utf-8")) or {})))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for key, value in _flat(names.comparable(as_plain(config))):
        recorded = before.get(key, value)
        if recorded != value and not key.startswith(FREE):
            raise ConfigError(
                f"run.resume={name}: {key} was {recorded} there and is {value} here;"
                f" `python launch.py --config-path {file.parent} run.resume={name}` goes on with it as it was"
            )


def _folder(config: Config, name: str) -> Path:
    try:
        return names.run(name, Path(config.outputs))
    except ConfigError as error:
        raise ConfigError(f"run.resume={error}") from error


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; text with `${` as it was recorded."""
    if not isinstance(tree, dict):
        yield prefix[:-1], tree.replace(r"\${", "${") if isinstance(tree, str) else tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.")
