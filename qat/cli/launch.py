"""The front door, whatever its name: `qat`, `python -m qat`, `python launch.py` in a clone."""

import sys

import hydra
from omegaconf import DictConfig

from qat.cli import job
from qat.cli import main as command_line
from qat.installation import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(config: DictConfig) -> float:
    """One composed job; Hydra calls it once a run and once for each job of a sweep."""
    return job.run(config)


def main() -> int:
    """Composes, checks and runs what was typed; returns the exit code."""
    return command_line.main(sys.argv[1:], launch)
