"""Folders that a run writes to."""

import os
from pathlib import Path

from qat.config import Config, Stage
from qat.errors import ConfigError


def check(config: Config) -> None:
    """The outputs folder can be written to; stage=doctor tells of it instead."""
    if config.stage is not Stage.doctor:
        check_folder("outputs", config.outputs)


def check_folder(key: str, folder: str) -> None:
    """A folder that is there and can be written to, or that can be made.

    Raises:
        ConfigError: it is neither.
    """
    if not folder.strip():
        raise ConfigError(f"{key} is empty: name a folder")
    path = Path(os.path.abspath(folder))
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"{key}={folder}: {nearest} is no folder that can be written to")
