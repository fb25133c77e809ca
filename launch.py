"""Entry point: compose a configuration, check it, run it. `python launch.py --help` says how."""

import sys

import hydra
from omegaconf import DictConfig

from qat.cli import job, main
from qat.config import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(config: DictConfig) -> float:
    """One composed job; Hydra calls it once a run and once for each job of a sweep."""
    return job.run(config)


if __name__ == "__main__":
    sys.exit(main.main(sys.argv[1:], launch))
