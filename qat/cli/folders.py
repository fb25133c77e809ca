"""Where a run or a sweep lands, as overrides for Hydra; called once all is checked."""

import os
from pathlib import Path

from hydra.core.override_parser.types import Override

from qat import names, processes
from qat.cli import ranks
from qat.cli.arguments import quote
from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.identities import claim_run, claim_sweep, places
from qat.runs import UNRECORDED


def claim(config: Config, parsed: list[Override], multirun: bool) -> list[str]:
    """Claims a run's identity or a sweep's folder, unless the user says where to go.

    Raises:
        ConfigError: the outputs folder cannot be written.
    """
    if config.stage is Stage.doctor or (not processes.place().first and config.stage not in UNRECORDED):
        return ranks.scratch()
    if config.run.resume:  # what Hydra recorded of the command that started it stays
        resumed = names.run(config.run.resume, Path(config.outputs))
        return [_set("hydra.run.dir", resumed), "hydra.output_subdir=null"]
    outputs, key = Path(config.outputs), "hydra.sweep.dir" if multirun else "hydra.run.dir"
    own = [str(override.value()) for override in parsed if override.key_or_group == key]
    if own:
        _check_identity(key, own[-1], outputs)
        return []
    try:
        return _claim(config.stage, outputs, multirun)
    except OSError as error:
        raise ConfigError(f"outputs={config.outputs} cannot be written: {error.strerror}") from error


def _check_identity(key: str, folder: str, outputs: Path) -> None:
    """A folder that is called like a run is not called like another one."""
    for run_id, place in places(outputs):
        if os.path.basename(os.path.normpath(folder)) == run_id and place.resolve() != Path(folder).resolve():
            raise ConfigError(f"{key}={folder}: {run_id} is the run in {place}: choose another name for the folder")


def _claim(stage: Stage, outputs: Path, multirun: bool) -> list[str]:
    if multirun:
        return [_set("hydra.sweep.dir", claim_sweep(outputs)), "hydra.sweep.subdir=${hydra.job.num}"]
    if stage in UNRECORDED:
        return [_set("hydra.run.dir", outputs / stage.name), "hydra.output_subdir=null"]
    return [_set("hydra.run.dir", outputs / claim_run(outputs))]


def _set(key: str, path: Path) -> str:
    return f"{key}={quote(str(path))}"
