"""One file a stage: the only place where parts meet.

`run_job` is what the command line calls. It opens the run's record, runs the stage, and closes the
record whatever happens.
"""

import importlib
import logging
import math
from pathlib import Path

from qat.config import Config, Stage
from qat.errors import QatError, UnavailableError
from qat.runs import Run

log = logging.getLogger(__name__)

UNAVAILABLE = {
    Stage.export: "stage=export: no export format is built into this version; the checkpoint folder holds the tables",
    Stage.report: "stage=report: this version writes no report; each run's result.json and loss.png are in its folder",
}


def run_job(config: Config, folder: Path) -> float:
    """Runs the configured stage in its folder.

    Returns:
        Full KL on held-out text, the objective of sweeps; NaN where the stage measures none.

    Raises:
        QatError: in one sentence, what the user can do; recorded in `result.json` too.
    """
    if config.stage in UNAVAILABLE:
        raise UnavailableError(UNAVAILABLE[config.stage])
    stage = importlib.import_module(f"qat.stages.{config.stage.name}")
    if config.stage is Stage.chat:
        stage.main(config)
        return math.nan
    run = Run(config, folder)
    try:
        stage.main(config, run)
    except QatError as error:
        run.finish("failed", str(error))
        raise
    except KeyboardInterrupt:
        run.finish("interrupted", "stopped from the keyboard")
        raise
    except Exception as error:
        log.exception("this is a defect of qat")
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise
    run.finish("complete")
    return float(run.result["metrics"].get("kl", math.nan))
