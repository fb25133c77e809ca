"""The model and teacher of the run whose checkpoint is named, where the command line names no model."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qat import names
from qat.cli import recorded
from qat.cli.arguments import quote
from qat.cli.compose import Composer, typed
from qat.config import Config, Stage, as_plain
from qat.errors import ConfigError, QatError

MODEL, TEACHER = "model", "teacher"
NAMING = ("checkpoint", "evaluate")  # what can name one


def words(overrides: list[str], composer: Composer) -> list[str]:
    """Overrides, as Hydra takes them, that give a job the model and the teacher of the run whose student it takes.

    None where a model is named, by a word, a preset, a recorded run or a person's own configuration; where the
    students are of runs of several models, which is refused when they are checked; and of a run that had the default.

    Raises:
        ConfigError: they are of runs of one model and several teachers.
    """
    said = {_section(text) for text in overrides}
    if not composer.is_default or MODEL in said or said.isdisjoint(NAMING):
        return []
    config, plain = (typed(composer.compose(some)) for some in (overrides, []))
    if config.model != plain.model or config.stage in names.CARRIES or not names.uses_checkpoint(config):
        return []
    runs = list(_runs(config))
    found = [tuple(_part(run, key) for key in (MODEL, TEACHER)) for run in map(_recorded, runs)]
    if not found or any(one[0] != found[0][0] for one in found):
        return []
    model, teacher = found[0]
    default = as_plain(plain.model)
    taken = [f"{MODEL}.{key}={_value(value)}" for key, value in model.items() if value != default[key]]
    if _asks_teacher(config) and config.teacher is None and TEACHER not in said:
        _refuse_several(runs, [one[1] for one in found])
        if not teacher:
            return taken
        listed = ", ".join(f"{key}: {_value(value)}" for key, value in teacher.items())
        taken += [f"++{TEACHER}=???", f"{TEACHER}={{{listed}}}"]  # null has no keys to set
    return taken


def _section(override: str) -> str:
    """What an override sets something of: `model` of `model=…`, `model.path=…` and `+schema@model=…`."""
    key = override.lstrip("+~").partition("=")[0]
    return key.rpartition("@")[2].partition(".")[0]


def _asks_teacher(config: Config) -> bool:
    """Whether a job has anything to do with a teacher of its own: what is exported or talked to has not."""
    return config.stage is not Stage.export and (config.stage is not Stage.chat or config.chat.teacher)


def _refuse_several(runs: list[Path], teachers: list[dict[str, Any]]) -> None:
    """Refuses runs whose students had several teachers, of which nothing says what to measure against."""
    other = next((number for number, teacher in enumerate(teachers) if teacher != teachers[0]), None)
    if other is not None:
        raise ConfigError(
            f"{runs[0].name} was taught by {_called(teachers[0])} and {runs[other].name} by {_called(teachers[other])}:"
            " say teacher=<option>, which they are measured against"
        )


def _called(teacher: dict[str, Any]) -> str:
    """What a person calls a teacher; a run without one has its model."""
    return str(teacher.get("path") or teacher.get("repo") or teacher.get("name") or "its own model")


def _runs(config: Config) -> Iterator[Path]:
    """The folders of the runs whose students the job takes."""
    outputs = Path(config.outputs)
    with suppress(QatError):  # told when they are checked
        places = [names.start(config), *(names.checkpoint(word, outputs) for word in config.evaluate.against)]
        yield from (run for place in places if place and (run := names.run_of(place)))


def _recorded(run: Path) -> dict[str, Any]:
    """The configuration of a run, nothing where it cannot be read: whose student it is, its record is asked then."""
    try:
        return recorded.read(run / recorded.FILE)
    except ConfigError:
        return {}


def _part(run: dict[str, Any], key: str) -> dict[str, Any]:
    said = run.get(key)
    return said if isinstance(said, dict) else {}


def _value(value: Any) -> str:
    """A value of a model's keys as Hydra's grammar has it."""
    return "null" if value is None else str(value) if type(value) is int else quote(str(value))
