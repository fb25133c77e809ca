"""One file a stage: the only place where parts meet.

`run_job` is what the command line calls. It opens the run's record, runs the stage, and closes the
record whatever happens.
"""

import importlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from qat import faults
from qat.config import Config
from qat.errors import QatError
from qat.report import log as run_log
from qat.runs import UNRECORDED, Run
from qat.store import transfer

log = logging.getLogger(__name__)

if not sys.stderr.isatty():  # other packages' bars would fill a log; tqdm reads this when torch imports it
    os.environ.setdefault("TQDM_DISABLE", "1")


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
    if config.stage in UNRECORDED:
        stage.main(config)
        return math.nan
    run = Run(config, folder, command, overrides)
    with transfer.mirrored(config.store, folder, run.result["run_id"]):
        _main(stage, config, run)
    return float(run.result["metrics"].get("kl", math.nan))


def _main(stage: ModuleType, config: Config, run: Run) -> None:
    """Runs a stage and closes its record, however it ends."""
    try:
        stage.main(transfer.with_named(config), run)
        run.finish("complete")
    except BaseException as error:
        told = _close(run, error)
        if told is error:
            raise
        raise told from error
    finally:
        run_log.refresh(Path(config.outputs))


def _close(run: Run, error: BaseException) -> BaseException:
    """Records how a run ended early; returns the error that the user is told."""
    told = error if isinstance(error, QatError) else faults.explain(error)
    if told is not None:
        run.finish("failed", str(told))
    elif isinstance(error, KeyboardInterrupt):
        run.finish("interrupted", str(error) or "stopped from the keyboard")
    else:
        log.error("this is a defect of qat", exc_info=error)
        run.finish("failed", f"{type(error).__name__}: {error}")
    return told or error
