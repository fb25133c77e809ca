"""What happens inside one job: record the configuration, run the stage, report its error."""

import math
import shlex
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qat import gpus, sweeps
from qat.artifacts import write_text
from qat.cli import ranks
from qat.cli.compose import typed
from qat.config import Config, as_plain
from qat.errors import QatError
from qat.identities import RESOLVED, RESULT, remove_empty
from qat.runs import UNRECORDED
from qat.suggest import one_line

# Of this process. Hydra's own return value does not reach `main`, nor do the words typed reach a job.
failures: list[QatError] = []
words: list[str] = []

LOG = "train.log"  # as conf/hydra/job_logging/qat.yaml has it

HEADER = """\
# This run, whole. To repeat it:
#   python launch.py --config-path <this folder> --config-name {name}
defaults:
  - schema
  - _self_
  - override hydra/job_logging: qat

"""


def run(composed: DictConfig) -> float:
    """Runs one job and returns its objective, the full KL; NaN for a job that failed or has none.

    A `QatError` is told here, in one line. In a sweep a defect is too, after its traceback in the log, so
    that the other jobs go on.
    """
    swept = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        return _run(typed(composed), Path(HydraConfig.get().runtime.output_dir), swept)
    except QatError as error:
        if ranks.speaks(error):
            one_line(error)
        failures.append(error)
    except Exception as error:
        if not swept:
            if ranks.speaks(error):
                raise
            raise SystemExit(1) from None
        one_line(error)
        failures.append(QatError(f"{type(error).__name__}: {error}"))
    return math.nan


def command_line(arguments: list[str]) -> str:
    """The words typed, as a line for a shell."""
    return shlex.join(["python", "launch.py", *arguments])


def _run(config: Config, folder: Path, swept: bool) -> float:
    settings = HydraConfig.get()
    if swept and "joblib" in settings.launcher._target_:
        gpus.take_one(settings.job.num)
    if config.stage not in UNRECORDED and config.run.resume is None:  # what is gone on with was recorded
        record(config, folder)
    from qat.stages import run_job  # torch and all: only when there is a job

    typed_words = _sweep_command(Path(settings.sweep.dir)) if swept else command_line(words)
    try:
        return run_job(config, folder, typed_words, list(settings.overrides.task))
    finally:
        if config.stage not in UNRECORDED and not (folder / RESULT).exists():
            _clear(folder, settings.output_subdir)
            remove_empty(folder)


def _clear(folder: Path, settings: str | None) -> None:
    """Leaves nothing of a run that was refused before it did anything."""
    if settings:
        shutil.rmtree(folder / settings, ignore_errors=True)
    for name in (f"{RESOLVED}.yaml", LOG):
        (folder / name).unlink(missing_ok=True)


def _sweep_command(folder: Path) -> str:
    """As the plan has it: the job may run in a process that was not given the command line."""
    return sweeps.load(folder).command if (folder / sweeps.PLAN).is_file() else command_line(words)


def record(config: Config, folder: Path) -> None:
    """Writes the file from which this run can be repeated."""
    write_text(folder / f"{RESOLVED}.yaml", resolved(config))


def resolved(config: Config) -> str:
    """The whole configuration as a file that Hydra reads."""
    return HEADER.format(name=RESOLVED) + OmegaConf.to_yaml(OmegaConf.create(_escaped(as_plain(config))))


def _escaped(value: Any) -> Any:
    """Text that happens to hold `${…}` stays text when read again."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value.replace("${", r"\${") if isinstance(value, str) else value
