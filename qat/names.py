"""What a person calls a checkpoint, a run, a sweep or a cache, and where it lies: the one place that knows.

    teacher                  the model itself
    SR-007, SR-007/last      a run of the outputs folder, wherever its own folder is: its best checkpoint, or another
                             of its own; of stage=convert the conversion
    sweep-001/SR-007, mine   what lies below the outputs folder; a run or a sweep by the name of its own folder
    q4_fp32                  a registered name, by its option or by its archive's name, here or in a store
    anything else            a path: a checkpoint folder, a run's folder, a V2 state dict or an archive of one of them

A word that means two things is refused with both; one that begins with `.`, `/` or `~` is a path alone. Nothing here
imports torch: the command line asks as well.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qat import options
from qat.artifacts import content_key
from qat.checkpoint_files import BEST, find
from qat.config import CheckpointConfig, Config, DataSource, Stage
from qat.errors import ArtifactError, ConfigError, QatError
from qat.identities import PLAN, RESOLVED, RESULT, RUN, places, recorded
from qat.store import archives
from qat.store.names import fold, is_there, local_folder
from qat.suggest import did_you_mean

TEACHER = "teacher"
TRAINS = (Stage.run, Stage.distill)
CARRIES = (Stage.pull, Stage.push)  # stages that only carry a checkpoint
_IDENTITY = re.compile(r"\bsr-(?=\d)", re.IGNORECASE)


def checkpoint(word: str, outputs: Path, archive: str | None = None) -> Path | None:
    """Where a checkpoint lies, or will lie once it is pulled or unpacked; None for the teacher.

    Args:
        word: what it is called.
        outputs: the outputs folder.
        archive: another name of its own, where a configuration says so.

    Raises:
        ConfigError: nothing is called that, several things are, or what is has no checkpoint.
    """
    if word == TEACHER:
        return None
    if file := archive_file(word):
        return _unpacked(file, outputs, "checkpoints")
    names = [] if _is_path(word) else aliases(word, archive)
    found = _distinct([*_meant(word, outputs), *(local_folder(outputs, "checkpoints", name) for name in names)])
    wrong = {path: reason for path in found if (reason := _no_checkpoint(path))}
    usable = [path for path in found if path not in wrong]
    if usable:
        place = _only(word, usable)
        return place / BEST if os.path.isdir(place / BEST) else place
    if wrong:
        raise ConfigError(next(iter(wrong.values())))
    if archive or (names and registered(word)):
        return local_folder(outputs, "checkpoints", names[0])
    raise _unknown(word, outputs)


def start(config: Config) -> Path | None:
    """As `checkpoint`, for the configured checkpoint."""
    given = config.checkpoint
    if given.name == "local" and not given.path:
        return None
    return checkpoint(given.path or given.name, Path(config.outputs), given.archive)


def uses_checkpoint(config: Config) -> bool:
    """Whether the stage does anything with the configured checkpoint."""
    return config.stage in (*TRAINS, Stage.convert, Stage.evaluate, Stage.export, Stage.chat, Stage.push)


def uses_cache(config: Config) -> bool:
    """Whether the stage needs a cache; evaluation does without it on anything else."""
    measures = config.stage is Stage.evaluate and not config.evaluate.apart
    return measures or config.stage in (*TRAINS, Stage.cache, Stage.convert)


def settled(given: CheckpointConfig, outputs: Path) -> CheckpointConfig:
    """The checkpoint with the path that its name stands for; unchanged if there is none, which is reported later."""
    if not given.path:
        return given
    try:
        place = checkpoint(given.path, outputs)
    except QatError:
        return given
    if place is None:
        return CheckpointConfig(TEACHER)
    if archive_file(given.path) or not os.path.exists(place):
        return given
    return replace(given, path=_shown(place) if given.path.startswith("./") else str(place))


def comparable(plain: dict[str, Any]) -> dict[str, Any]:
    """A configuration as plain values, its checkpoint called as below its outputs folder, whatever the current one."""
    match plain:
        case {"checkpoint": {"path": str(path), **given}, "outputs": str(home)} if Path(path).is_relative_to(home):
            return plain | {"checkpoint": given | {"path": str(Path(path).relative_to(home))}}
    return plain


def run(word: str, outputs: Path) -> Path:
    """The folder of a run.

    Raises:
        ConfigError: there is none of that name, or several.
    """
    found = [path for path in _meant(word, outputs) if _is_run(path)]
    if not found:
        raise ConfigError(f"{word}: no such run in {outputs}{did_you_mean(word, _identities(outputs))}")
    return _only(word, _distinct(found))


def sweep(word: str, outputs: Path) -> Path:
    """The folder of a planned sweep.

    Raises:
        ConfigError: there is none of that name, or several.
    """
    name = word.rstrip("/")
    own = [folder.parent for _, folder in places(outputs) if folder.parent.name == name]
    found = _distinct([path for path in (*_meant(word, outputs), *own) if os.path.isfile(path / PLAN)])
    if not found:
        known = {folder.parent.name for _, folder in places(outputs) if os.path.isfile(folder.parent / PLAN)}
        hint = did_you_mean(name, known)
        raise ConfigError(f"{word}: no {PLAN} there{hint}; name the folder of a sweep, such as {outputs}/sweep-001")
    return _only(word, found)


def cached(config: Config) -> Path | None:
    """Where the configured cache lies, or will lie once it is pulled or unpacked; None where it is recorded here.

    Raises:
        ConfigError: several caches are called that.
    """
    outputs, word = Path(config.outputs), config.cache.path
    pulled = [local_folder(outputs, "caches", name) for name in cache_names(config)]
    if not word:
        return next((path for path in pulled if is_there(path, "caches")), None)
    if file := archive_file(word):
        return _unpacked(file, outputs, "caches")
    path = Path(os.path.expanduser(word))
    found = _distinct([path, outputs / path, *pulled])
    return _only(word, found) if found else pulled[0]


def cache_names(config: Config) -> list[str]:
    """What the configured cache is called in a store: its own name, or those that the old run log has for its text.

    Whatever random sample those kept beside. Caches of other text are made from the configuration and keyed by
    content, so a name says too little.
    """
    given, data = config.cache, config.data
    if given.path:
        return aliases(given.path, group="cache")
    if data.source is not DataSource.alpaca or data.path:
        return []
    name = f"{data.name}_chat_think_{data.thinking}_L{given.length}_K{given.top_k}_R"
    registered = [archive for archive in _options("cache").values() if archive.startswith(name)]
    return list(dict.fromkeys([*registered, f"{name}{given.random}"]))


def archive_file(word: str) -> Path | None:
    """The archive at hand that a word is the path of."""
    file = Path(os.path.expanduser(word))
    return file if archives.is_archive(word) and os.path.isfile(file) else None


def called(path: Path, outputs: Path) -> str:
    """What a person calls the checkpoint at a path: `SR-007`, `SR-007/last`, a registered name, else the path."""
    folder = run_of(path)
    if folder is not None:
        identity = folder.name if RUN.fullmatch(folder.name) else recorded(folder) or folder.name
        return identity if path.name == "best" or os.path.isfile(path / RESULT) else f"{identity}/{path.name}"
    if os.path.dirname(os.path.realpath(path)) == os.path.realpath(outputs / "checkpoints"):
        return registered(path.name) or path.name
    return str(path)


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path is, or is a checkpoint of."""
    if os.path.isfile(path / RESULT):
        return path
    folder = path.absolute().parent.parent
    of_run = path.parent.name == "checkpoints" and (os.path.isfile(folder / RESULT) or RUN.fullmatch(folder.name))
    return folder if of_run else None


def registered(word: str, group: str = "checkpoint") -> str | None:
    """The option that a word is a spelling of: `Q2_0.5341`, or the archive's name, for `q2_0_5341`."""
    plain = fold(archives.stem(word.removesuffix("/best_state_dict.pt")))
    options = _options(group).items()
    return next((option for option, archive in options if plain in (fold(option), fold(archive))), None)


def aliases(word: str, archive: str | None = None, group: str = "checkpoint") -> list[str]:
    """What something may be called where it is pulled to and in a store; first as the word has it."""
    option = registered(word, group)
    names = [option, _options(group)[option]] if option else [word, archive]
    if option and fold(word) != fold(option):
        names.reverse()
    return list(dict.fromkeys(filter(None, names)))


def _options(group: str) -> dict[str, str]:
    """The options of a group that stand for an archive, each with the archive's own name."""
    named = {path.stem: _archive(path.absolute()) for path in options.files(group)}
    return {option: archive for option, archive in named.items() if archive}


@cache
def _archive(option: Path) -> str | None:
    """The archive that an option names; none in a file of a person's own that cannot be read, as composing it tells."""
    try:
        said = yaml.safe_load(option.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return None
    found = isinstance(said, dict) and (said.get("archive") or said.get("path"))
    return found if isinstance(found, str) else None


def _meant(word: str, outputs: Path) -> Iterator[Path]:
    """Every path that a word may stand for: its own, below the outputs folder, of a run by identity or folder."""
    if not word:
        return
    path = os.path.expanduser(word)
    yield Path(path)
    if _is_path(word):
        return
    below = _IDENTITY.sub("SR-", os.path.normpath(path))
    yield outputs / below
    head, _, rest = below.partition("/")
    for run_id, folder in places(outputs):
        if head in (run_id, folder.name):
            yield folder / rest
            if rest:
                yield folder / "checkpoints" / rest


def _distinct(paths: list[Path]) -> list[Path]:
    """Those that are there, each place once."""
    found: dict[str, Path] = {}
    for path in paths:
        if os.path.exists(path):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _only(word: str, paths: list[Path]) -> Path:
    if len(paths) > 1:
        listed = " and ".join(map(_shown, paths))
        raise ConfigError(f"{word} is in {len(paths)} places, {listed}: name the one you mean")
    return paths[0]


def _shown(path: Path) -> str:
    """The path, written so that it cannot be taken for another name."""
    return str(path) if path.is_absolute() else f".{os.sep}{path}"


def _is_path(word: str) -> bool:
    return word.startswith((".", "/", "~"))


def _no_checkpoint(path: Path) -> str:
    """Why there is no checkpoint at a path; nothing where there is one."""
    try:
        find(path)
    except ArtifactError as error:
        return str(error)
    return ""


def _unpacked(file: Path, outputs: Path, kind: str) -> Path:
    """Where an archive is unpacked: a changed one has another place."""
    seen = file.stat()
    key = content_key([str(file.resolve()), seen.st_size, seen.st_mtime_ns])
    return local_folder(outputs, kind, f"{archives.stem(file.name)}-{key}")


def _is_run(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in (RESULT, f"{RESOLVED}.yaml"))


def _identities(outputs: Path) -> set[str]:
    return {run_id for run_id, _ in places(outputs)}


def _unknown(word: str, outputs: Path) -> ConfigError:
    for run_id, folder in places(outputs):
        if _IDENTITY.sub("SR-", word) == run_id:
            return ConfigError(f"{word}: its folder {folder} is not there: it was moved or deleted, or has not begun")
    options = [TEACHER, *_options("checkpoint")]
    pulled = [path.name for path in (outputs / "checkpoints").glob("[!.]*")]
    return ConfigError(
        f"{word}: no such folder or file, no run in {outputs}{did_you_mean(word, _identities(outputs))}, and no"
        f" registered or pulled name{did_you_mean(word, [*options, *pulled])}; registered are {', '.join(options)}"
    )
