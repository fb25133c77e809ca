"""What happens inside one job: record the configuration, run the stage, report its error."""

import math
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qat.artifacts import write_text
from qat.cli.arguments import RESOLVED
from qat.cli.compose import typed
from qat.cli.folders import UNRECORDED
from qat.cli.suggest import one_line
from qat.config import Config, as_plain
from qat.errors import QatError

failures: list[QatError] = []  # of this process; Hydra's own return value does not reach `main`

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

    A `QatError` is told here, in one line, so that the other jobs of a sweep go on.
    """
    try:
        return _run(typed(composed), Path(HydraConfig.get().runtime.output_dir))
    except QatError as error:
        one_line(error)
        failures.append(error)
        return math.nan


def _run(config: Config, folder: Path) -> float:
    if config.stage not in UNRECORDED:
        record(config, folder)
    from qat.stages import run_job  # torch and all: only when there is a job

    return run_job(config, folder)


def record(config: Config, folder: Path) -> None:
    """Writes the file from which this run can be repeated."""
    values = OmegaConf.to_yaml(OmegaConf.create(_escaped(as_plain(config))))
    write_text(folder / f"{RESOLVED}.yaml", HEADER.format(name=RESOLVED) + values)


def _escaped(value: Any) -> Any:
    """Text that happens to hold `${…}` stays text when read again."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value.replace("${", r"\${") if isinstance(value, str) else value
