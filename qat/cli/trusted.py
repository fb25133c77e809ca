"""Allows options to be read from the user's own folders only, never from a run or a store.

Whoever writes options decides what Hydra runs. A folder that someone names as his own (`--config-dir`, `--config-path`
with a configuration in it) is trusted like the command line; one that holds a run, a sweep or an artifact is data,
whoever made it, and so is all that lies in it.
"""

import os
import re
from pathlib import Path

from qat.config import CONF
from qat.errors import ConfigError
from qat.identities import IDS, PLAN, RESOLVED, RESULT, RUN

# Files that mark a folder as a run or a sweep, and folders where an outputs folder keeps what it made or pulled.
MARKS = (f"{RESOLVED}.yaml", RESULT, PLAN, ".hydra")
NAMES = re.compile(rf"{RUN.pattern}|sweep-\d{{3,}}|\.hydra")
KEPT = ("artifacts", "caches", "checkpoints", IDS)


def holder(path: Path) -> Path | None:
    """The run, sweep, artifact or pulled archive that a path is or lies in; None for what is a person's own."""
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        if place.is_relative_to(CONF):
            continue
        for folder in (place, *place.parents):
            if _holds_data(folder):
                return folder
    return None


def refuse_data(path: Path, what: str) -> None:
    """Refuses options and task files outside the user's own folders.

    Raises:
        ConfigError: the path lies in a run, a sweep, an artifact or what was pulled.
    """
    if found := holder(path):
        raise ConfigError(
            f"{what}: {found} holds what a run left or a store gave, which is data: nothing there is read as options;"
            " copy what you trust into a folder of your own"
        )


def _holds_data(folder: Path) -> bool:
    kept = folder.name in KEPT and any((folder.parent / name).is_dir() for name in (IDS, "artifacts"))
    return kept or bool(NAMES.fullmatch(folder.name)) or any(os.path.lexists(folder / name) for name in MARKS)
