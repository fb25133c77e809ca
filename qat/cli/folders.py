"""Where a run or a sweep lands, as overrides for Hydra; called once all is checked."""

from pathlib import Path

from hydra.core.override_parser.types import Override

from qat.cli import ranks
from qat.cli.arguments import quote
from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.runs import UNRECORDED, claim_run, claim_sweep


def claim(config: Config, parsed: list[Override], multirun: bool) -> list[str]:
    """Claims a run's identity or a sweep's folder, unless the user says where to go.

    Raises:
        ConfigError: the outputs folder cannot be written.
    """
    if config.stage is Stage.doctor or (ranks.rank() > 0 and config.stage not in UNRECORDED):
        return ranks.scratch()
    if config.run.resume:  # what Hydra recorded of the command that started it stays
        return [_set("hydra.run.dir", Path(config.outputs) / config.run.resume), "hydra.output_subdir=null"]
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    if any(override.key_or_group == key for override in parsed):
        return []
    outputs = Path(config.outputs)
    try:
        return _claim(config.stage, outputs, multirun)
    except OSError as error:
        raise ConfigError(f"outputs={config.outputs} cannot be written: {error.strerror}") from error


def _claim(stage: Stage, outputs: Path, multirun: bool) -> list[str]:
    if multirun:
        return [_set("hydra.sweep.dir", claim_sweep(outputs)), "hydra.sweep.subdir=${hydra.job.num}"]
    if stage in UNRECORDED:
        return [_set("hydra.run.dir", outputs / stage.name), "hydra.output_subdir=null"]
    return [_set("hydra.run.dir", outputs / claim_run(outputs))]


def _set(key: str, path: Path) -> str:
    return f"{key}={quote(str(path))}"
