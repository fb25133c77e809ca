"""What happens inside one job: record the configuration, run the stage, report its error."""

import importlib
import shlex
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qat import faults, gpus, runs, sweeps, system
from qat.artifacts import write_text
from qat.cli import apart, ranks, recorded
from qat.cli.apart import Outcome
from qat.cli.compose import typed
from qat.config import Config, Stage
from qat.errors import QatError
from qat.identities import RESULT, remove_empty
from qat.installation import command
from qat.names import TRAINS
from qat.report import log as run_log
from qat.runs import LOG, UNRECORDED
from qat.suggest import one_line

# State of this process: Hydra passes no return value to `main`, and no command line to a job.
failures: list[Outcome] = []
words: list[str] = []


def run(composed: DictConfig) -> float:
    """Runs one job and returns its objective, the full KL; NaN for a job that failed or has none.

    A `QatError` is told here, in one line. In a sweep a defect is too, after its traceback in the log, so
    that the other jobs go on; and each job has a process of its own, so that they do even when it dies.
    """
    settings = HydraConfig.get()
    if settings.mode is not RunMode.MULTIRUN or not apart.is_possible():
        return _noted(_told(composed))
    if "joblib" in settings.launcher._target_:
        gpus.take_one(settings.job.num)
    _import(typed(composed))  # once here, before jobs are forked, so that every job has it
    try:
        return _noted(apart.run(lambda: _told(composed)))
    except apart.Died as death:
        error = faults.death(death.code, str(death))
        one_line(error)
        _bury(typed(composed), error)
        return _noted(Outcome(failure=str(error)))


def _told(composed: DictConfig) -> Outcome:
    """Runs a job and reports an error that ends it."""
    swept = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        return Outcome(_run(typed(composed), _folder(), swept))
    except QatError as error:
        if ranks.speaks(error):
            one_line(error)
        return Outcome(failure=str(error), exit_code=error.exit_code)
    except Exception as error:
        if not swept:
            if ranks.speaks(error):
                raise
            raise SystemExit(1) from None
        one_line(error)
        return Outcome(failure=f"{type(error).__name__}: {error}")


def _noted(outcome: Outcome) -> float:
    """Keeps a failure for the exit code."""
    if outcome.failure is not None:
        failures.append(outcome)
    return outcome.objective


def _folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _bury(config: Config, error: QatError) -> None:
    """Records an error that the job could not record itself."""
    overrides = list(HydraConfig.get().overrides.task)
    runs.record_death(config, _folder(), _sweep_command(_folder().parent), overrides, str(error))
    run_log.refresh(Path(config.outputs))


def command_line(arguments: list[str]) -> str:
    """The words typed, as a line for a shell."""
    return shlex.join([*command().split(), *arguments])


def _run(config: Config, folder: Path, swept: bool) -> float:
    settings = HydraConfig.get()
    typed_words = _sweep_command(Path(settings.sweep.dir)) if swept else command_line(words)
    overrides = list(settings.overrides.task)
    return start(config, folder, typed_words, overrides, settings.output_subdir, own_process=True)


def check(configs: Iterable[Config]) -> None:
    """Looks, before anything has a number, whether the models suit what each job asks of them.

    Only those that make a student ask, since this imports torch.

    Raises:
        QatError: the first thing that would not work.
    """
    for config in configs:
        if config.stage in (*TRAINS, Stage.convert):
            from qat.stages import check as suits

            suits(config)


def start(
    config: Config,
    folder: Path,
    command: str,
    overrides: list[str],
    settings: str | None = None,
    own_process: bool = False,
) -> float:
    """Records a configuration and runs its stage; returns what `run_job` does.

    Args:
        config: the checked configuration.
        folder: the run's own, which exists.
        command: the command line, for the record.
        overrides: what it sets for this job.
        settings: the folder inside in which Hydra has put its own; of a refused run nothing stays.
        own_process: whether this process is the run's alone, so that what it imports may stay until its end.

    Raises:
        QatError: as `run_job`.
    """
    if config.stage not in UNRECORDED and config.run.resume is None:  # a resumed run was recorded when it was started
        record(config, folder)
    from qat.stages import run_job  # imports torch, so it is imported only when a job runs

    try:
        if own_process:
            _import(config)
        return run_job(config, folder, command, overrides)
    finally:
        if config.stage not in UNRECORDED and not (folder / RESULT).exists():
            _clear(folder, settings)
            remove_empty(folder)
        own = Path(config.outputs) / config.stage.name
        if config.stage in UNRECORDED and folder.resolve() == own.resolve():  # Hydra's, where a warning would be logged
            remove_empty(folder)


def _import(config: Config) -> None:
    """Imports what a stage needs, and keeps it: each of its phases begins with a collection of garbage."""
    with suppress(ImportError):  # the job says what is missing
        importlib.import_module(f"qat.stages.{config.stage.name}")
        system.keep()


def _clear(folder: Path, settings: str | None) -> None:
    """Leaves nothing of a run that was refused before it did anything."""
    if settings:
        shutil.rmtree(folder / settings, ignore_errors=True)
    for name in (recorded.FILE, LOG):
        (folder / name).unlink(missing_ok=True)


def _sweep_command(folder: Path) -> str:
    """As the plan has it: the job may run in a process that was not given the command line."""
    return sweeps.load(folder).command if (folder / sweeps.PLAN).is_file() else command_line(words)


def record(config: Config, folder: Path) -> None:
    """Writes the file from which this run can be repeated."""
    write_text(folder / recorded.FILE, recorded.written(config))
