"""Chooses the folder of a run or a sweep, as overrides for Hydra; called after all checks."""

import os
from pathlib import Path

from qat import names, processes
from qat.cli import ranks, recorded, trusted
from qat.cli.arguments import quote
from qat.cli.checks.outputs import can_be_written
from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.identities import PLAN, RESULT, claim_run, claim_sweep, places
from qat.runs import LOG, UNRECORDED

# Files of a job that was stopped before it began: once it begins, `qat.runs` writes a record before anything else.
NOT_BEGUN = {".hydra", recorded.FILE, LOG}


def claim(config: Config, named: Path | None, multirun: bool) -> list[str]:
    """Claims a run's identity or a sweep's folder, unless the user says where to go.

    Args:
        config: of the run, or the first job.
        named: the folder that the user wants it in.
        multirun: it is a sweep.

    Raises:
        ConfigError: the outputs folder cannot be written, or the named folder is not free.
    """
    if config.stage is Stage.doctor or (not processes.place().first and config.stage not in UNRECORDED):
        return ranks.scratch()
    if config.run.resume:  # the configuration that Hydra recorded when the run was started is kept
        resumed = names.run(config.run.resume, Path(config.outputs))
        if named and os.path.realpath(named) != os.path.realpath(resumed):
            raise ConfigError(
                f"hydra.run.dir={named}: {config.run.resume} goes on in {resumed}, so leave this out"
            )
        return [_set("hydra.run.dir", resumed), "hydra.output_subdir=null"]
    outputs, key = Path(config.outputs), "hydra.sweep.dir" if multirun else "hydra.run.dir"
    if named:
        _check_identity(key, named, outputs)
        if config.stage not in UNRECORDED or trusted.holder(named):
            check_free(key, named)
        return []
    try:
        return _claim(config.stage, outputs, multirun)
    except OSError as error:
        raise ConfigError(f"outputs={config.outputs} cannot be written: {error.strerror}") from error


def check_free(key: str, folder: Path) -> None:
    """Checks that the folder of a new run or sweep holds nothing else.

    Raises:
        ConfigError: something else is in it, such as a run.
    """
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if set(there) <= NOT_BEGUN:
        return
    what, remedy = there[0], "name a new or empty folder"
    if {RESULT, recorded.FILE} & set(there):
        what, remedy = "a run", f"{remedy}, or go on with that run: --config-path {folder} run.resume={folder}"
    elif PLAN in there:
        what = "a sweep"
    raise ConfigError(f"{key}={folder}: there is {what} in it already: {remedy}")


def _check_identity(key: str, folder: Path, outputs: Path) -> None:
    """Checks that a folder with the name of a run does not have the name of another run."""
    for run_id, place in places(outputs):
        if folder.name == run_id and os.path.realpath(place) != os.path.realpath(folder):
            raise ConfigError(f"{key}={folder}: {run_id} is the run in {place}: choose another name for the folder")


def _claim(stage: Stage, outputs: Path, multirun: bool) -> list[str]:
    if multirun:
        return [_set("hydra.sweep.dir", claim_sweep(outputs)), "hydra.sweep.subdir=${hydra.job.num}"]
    if stage in UNRECORDED:
        folder = outputs if stage is not Stage.chat or can_be_written(outputs) else ranks.passing()
        return [_set("hydra.run.dir", folder / stage.name), "hydra.output_subdir=null"]
    return [_set("hydra.run.dir", outputs / claim_run(outputs))]


def _set(key: str, path: Path) -> str:
    return f"{key}={quote(str(path))}"
