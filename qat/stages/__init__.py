"""One file a stage: the only place where parts meet.

`run_job` is what the command line calls. It opens the run's record, runs the stage, and closes the
record whatever happens.
"""

import importlib
import logging
import math
import os
import sys
from pathlib import Path

from qat.config import Config, Stage
from qat.errors import QatError
from qat.runs import Run

log = logging.getLogger(__name__)

if not sys.stderr.isatty():  # other packages' bars would fill a log; tqdm reads this when torch imports it
    os.environ.setdefault("TQDM_DISABLE", "1")


def run_job(config: Config, folder: Path) -> float:
    """Runs the configured stage in its folder.

    Returns:
        Full KL on held-out text, the objective of sweeps; NaN where the stage measures none.

    Raises:
        QatError: in one sentence, what the user can do; recorded in `result.json` too.
    """
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
