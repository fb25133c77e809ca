"""Folders that a run writes to."""

import os
from pathlib import Path

from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.suggest import did_you_mean


def check(config: Config) -> None:
    """Checks that the outputs folder can be written to; stage=doctor reports on it, and stage=chat may only read.

    Raises:
        ConfigError: it cannot, or a report is asked for of a folder that is not there.
    """
    if config.stage not in (Stage.doctor, Stage.chat):
        check_folder("outputs", config.outputs)
    if config.stage is Stage.report:
        _check_there(Path(config.outputs))


def _check_there(outputs: Path) -> None:
    if outputs.is_dir():
        return
    beside = [path.name for path in outputs.absolute().parent.glob("*") if path.is_dir()]
    meant = did_you_mean(outputs.name, beside)
    raise ConfigError(f"outputs={outputs} is not there, so there is nothing to report{meant}")


def check_folder(key: str, folder: str) -> None:
    """Checks that a folder exists and can be written to, or that it can be created.

    Raises:
        ConfigError: it is neither.
    """
    if not folder.strip():
        raise ConfigError(f"{key} is empty: name a folder")
    if (nearest := _unwritable(Path(os.path.abspath(folder)))) is not None:
        raise ConfigError(f"{key}={folder}: {nearest} is no folder that can be written to")


def can_be_written(folder: Path) -> bool:
    """Whether a folder can be written to, or can be created."""
    return _unwritable(folder.absolute()) is None


def _unwritable(path: Path) -> Path | None:
    """What of a path is there already and is no folder that can be written to."""
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest
