"""Folders that a run writes to."""

import os
from pathlib import Path

from qat.config import Config, Stage
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Checks that the outputs folder can be written to; stage=doctor reports on it instead."""
    if config.stage is not Stage.doctor:
        check_folder("outputs", config.outputs)


def check_folder(key: str, folder: str) -> None:
    """Checks that a folder exists and can be written to, or that it can be created.

    Raises:
        ConfigError: it is neither.
    """
    if not folder.strip():
        raise ConfigError(f"{key} is empty: name a folder")
    path = Path(os.path.abspath(folder))
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"{key}={folder}: {nearest} is no folder that can be written to")
