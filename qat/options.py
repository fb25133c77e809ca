"""Where the options of groups lie: `conf/` of the package, and folders of a person's own that add to them.

    --config-dir <folder>    named in the command
    conf/                    in the current folder
    QAT_CONF=<folder>        named once for all; several are separated as in PATH

Own options add groups and options and replace none: a name that stands for two different files is refused where it is
used.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from qat.errors import ConfigError
from qat.installation import CONF

VARIABLE = "QAT_CONF"
BESIDE = "conf"
_named: list[str] = []  # what --config-dir names in this process


def name(folder: str | None) -> None:
    """Adds the folder that a command line names, in place of an earlier one's."""
    _named[:] = [folder.removeprefix("file://")] if folder and "://" not in folder.removeprefix("file://") else []


def standing() -> list[Path]:
    """Own folders that no flag names, in the order in which they are searched.

    Raises:
        ConfigError: one that `QAT_CONF` names is not there.
    """
    listed = [Path(os.path.expanduser(word)) for word in os.environ.get(VARIABLE, "").split(os.pathsep) if word]
    for folder in listed:
        if not folder.is_dir():
            raise ConfigError(f"{VARIABLE}={os.environ[VARIABLE]}: no such folder: {folder}")
    return _others([Path(BESIDE), *listed])


def own() -> list[Path]:
    """All own folders, in the order in which they are searched."""
    return _others([*map(Path, _named), *standing()])


def files(group: str) -> list[Path]:
    """The files of a group's options by name; of two with one name that of the package."""
    found: dict[str, Path] = {}
    for folder in (CONF, *own()):
        for file in (folder / group).glob("*.yaml"):
            found.setdefault(file.stem, file)
    return [found[stem] for stem in sorted(found)]


@cache
def defaults() -> dict[str, str]:
    """The option of each group that is taken when none is named; read once."""
    listed = OmegaConf.load(CONF / "config.yaml").defaults
    return {name: option for entry in listed if not isinstance(entry, str) for name, option in entry.items()}


def groups() -> list[str]:
    """The groups that own folders have options of, the package's among them."""
    places = {file.parent.name for folder in own() for file in folder.glob("[!.]*/*.yaml")}
    return sorted(places - {"hydra"})


def check_single(file: Path) -> None:
    """Refuses an option whose name stands for something else in another of these folders.

    Raises:
        ConfigError: there is another file of that name.
    """
    folders = own()
    place = next((folder for folder in (CONF, *folders) if folder.absolute() in file.absolute().parents), None)
    if place is None or not folders:
        return
    inside = file.absolute().relative_to(place.absolute())
    for other in (folder / inside for folder in (CONF, *folders) if folder != place):
        if len(inside.parts) > 1 and other.is_file() and other.read_bytes() != file.read_bytes():
            raise ConfigError(
                f"{inside.parent}={inside.stem} is two options, {file} and {other}: give your own another name"
            )


def _others(folders: list[Path]) -> list[Path]:
    """Those that are there and not the package's, each place once."""
    return list(_places(folders))


def _places(folders: list[Path]) -> Iterator[Path]:
    seen = {os.path.realpath(CONF)}
    for folder in folders:
        place = os.path.realpath(folder)
        if place not in seen and folder.is_dir():
            seen.add(place)
            yield folder
