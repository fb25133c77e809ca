"""What `sweep.json` may say, whoever wrote it: jobs that set keys of ours to values, under identities of runs.

A plan is read again by the same command, by `sweep.resume=` and by every job, and Hydra composes what it says. So it
is checked whenever it is read and before it is written.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qat import bounded, references
from qat.config import Config
from qat.errors import ArtifactError
from qat.identities import RUN

FLAGS = ("config_path", "config_name", "config_dir")  # command-line flags that decide which files Hydra composes

_SECTIONS = {field.name for field in fields(Config)} | {"schema", "experiment", "debug"}
_GROUPS = {name for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}
_KEY = re.compile(r"\+{0,2}[A-Za-z_][\w./@]*")


@dataclass(frozen=True)
class Job:
    """One job: its run, the overrides that compose it, and the key of its configuration."""

    run_id: str
    overrides: list[str]
    key: str


@dataclass(frozen=True)
class Plan:
    """What the file says; `flags` are the command line's own, such as `config_path`."""

    command: str
    flags: dict[str, str]
    jobs: list[Job]
    outputs: Path | None


def read(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        ArtifactError: it cannot be read, or says what no plan does.
    """
    said = bounded.read(path)
    jobs = [_job(entry, path) for entry in _typed(said, "jobs", list, path)]
    if not jobs or len({job.run_id for job in jobs}) < len(jobs):
        raise _wrong(path, "jobs")
    flags = _typed(said, "flags", dict, path)
    if not all(name in FLAGS and isinstance(value, str) for name, value in flags.items()):
        raise _wrong(path, "flags")
    home = said.get("outputs")
    if not isinstance(home, str | None) or "\0" in (home or ""):
        raise _wrong(path, "outputs")
    return Plan(_typed(said, "command", str, path), flags, jobs, Path(home) if home else None)


def foreign(overrides: Iterable[str]) -> str | None:
    """The first override that no job has: a setting of Hydra, something deleted, a reference, an option by its path."""
    return next((text for text in overrides if not _is_ours(text)), None)


def _is_ours(override: str) -> bool:
    key, equals, value = override.partition("=")
    places = key.lstrip("+").split("@")
    sections = {re.split("[./]", place)[0] for place in places}
    is_path = places[0] in _GROUPS and "/" in value and not value.startswith("{")
    return bool(equals and _KEY.fullmatch(key)) and sections <= _SECTIONS and not is_path and _is_value(override)


def _is_value(override: str) -> bool:
    """Whether an override, read as Hydra reads it, sets one value without a reference in it."""
    try:
        read = OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError, ValueError):
        return False
    return not read.is_sweep_override() and not any(map(references.is_live, _texts(read.value())))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _job(entry: Any, path: Path) -> Job:
    if not isinstance(entry, dict):
        raise _wrong(path, "jobs")
    run_id, key = _typed(entry, "run_id", str, path), _typed(entry, "key", str, path)
    overrides = _typed(entry, "overrides", list, path)
    if not RUN.fullmatch(run_id):
        raise _wrong(path, "run_id")
    if not all(isinstance(text, str) for text in overrides):
        raise _wrong(path, "overrides")
    if text := foreign(overrides):
        raise ArtifactError(f"{path} has {text} in {run_id}: of a plan only values of our own keys are read")
    return Job(run_id, overrides, key)


def _typed(said: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    if not isinstance(said.get(key), kind):
        raise _wrong(path, key)
    return said[key]


def _wrong(path: Path, key: str) -> ArtifactError:
    return ArtifactError(f"{path} is not a readable plan of a sweep: its {key} cannot be")
