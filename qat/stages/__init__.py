"""One file a stage: the only place where parts meet.

`check` and `run_job` are what the command line calls. The latter opens the run's record, runs the stage, and closes
the record whatever happens.
"""

import importlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from qat import faults, identities, sweeps, transfer
from qat.config import Config, Stage
from qat.console import size
from qat.errors import MachineError, NumericsError, QatError, RankError
from qat.report import log as run_log
from qat.runs import RESULT, UNRECORDED, Run

log = logging.getLogger(__name__)

if not sys.stderr.isatty():  # other packages' bars would fill a log; tqdm reads this when torch imports it
    os.environ.setdefault("TQDM_DISABLE", "1")


def check(config: Config) -> None:
    """Refuses what the shapes of a model show not to work, before a run has a number or a folder.

    Raises:
        QatError: in one sentence, what the user can do.
    """
    importlib.import_module("qat.stages.beforehand").check(config)


def run_job(config: Config, folder: Path, command: str = "", overrides: Sequence[str] = ()) -> float:
    """Runs the configured stage in its folder.

    Args:
        config: the checked configuration.
        folder: the run's own folder.
        command: the command line as typed, for the record.
        overrides: what it sets for this job, for the record.

    Returns:
        Full KL on held-out text, the objective of sweeps; NaN where the stage measures none.

    Raises:
        QatError: in one sentence, what the user can do; recorded in `result.json` too.
    """
    stage = importlib.import_module(f"qat.stages.{config.stage.name}")
    if config.stage is not Stage.doctor:  # stage=doctor only looks and writes no record
        identities.sweep(Path(config.outputs))
    if config.stage in UNRECORDED:
        stage.main(config)
        return math.nan
    planned = sweeps.has_job(folder)
    run = Run(config, folder, command, overrides, goes_on=planned or config.run.resume is not None)
    with transfer.mirrored(config.store, folder, run.result["run_id"]):
        _main(stage, config, run, planned)
    return float(run.result["metrics"].get("kl", math.nan))


def _main(stage: ModuleType, config: Config, run: Run, planned: bool) -> None:
    """Runs a stage and closes its record, however it ends; a planned job keeps its record in any case."""
    try:
        stage.main(transfer.with_named(config), run)
        _refuse_no_numbers(run)
        _tell_memory(run)
        run.finish("complete")
    except BaseException as error:
        told = error if isinstance(error, QatError) else faults.explain(error)
        if _is_refusal(told) and not (run.begun or run.result["resumed"] or planned):
            run.withdraw()
        else:
            _close(run, told, error)
        if told in (None, error):
            raise
        assert told is not None
        raise told from error
    finally:
        if (run.folder / RESULT).exists():
            run_log.refresh(Path(config.outputs))


def _refuse_no_numbers(run: Run) -> None:
    """Refuses figures that are NaN or infinite: a run with such a figure is not complete."""
    for name, value in run.result["metrics"].items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericsError(f"{name} came out as {value}: nothing can be said of what was made")


def _tell_memory(run: Run) -> None:
    """Logs what the phase that took most took, beside what it was expected to take; the record has all of them."""
    phases = run.result["memory"].get("phases", {})
    known = {name: one for name, one in phases.items() if one.keys() >= {"planned_bytes", "peak_bytes"}}
    if known:
        most = max(known, key=lambda name: known[name]["peak_bytes"])
        taken, planned = (size(known[most][which]) for which in ("peak_bytes", "planned_bytes"))
        log.info("memory: %s taken, %s expected, for %s", taken, planned, most)


def _is_refusal(told: QatError | None) -> bool:
    """True for what is wrong with what was asked, rather than with the machine."""
    return told is not None and not isinstance(told, MachineError | RankError)


def _close(run: Run, told: QatError | None, error: BaseException) -> None:
    """Records how a run ended early."""
    if told is not None:
        run.finish("failed", str(told))
    elif isinstance(error, KeyboardInterrupt):
        run.finish("interrupted", str(error) or "stopped from the keyboard")
    else:
        log.error("this is a defect of qat", exc_info=error)
        run.finish("failed", f"{type(error).__name__}: {error}")
