"""The machine: there is something for every process to compute with."""

from qat import gpus, provenance
from qat.config import Config
from qat.errors import ConfigError

PROCESSES_A_CORE = 4  # that share batches on a computer without as many GPUs: beyond, they only wait for each other


def check(config: Config) -> None:
    """No more processes than this computer takes."""
    devices, visible, cores = config.instance.devices, len(gpus.visible()), provenance.cores()
    limit = max(visible, PROCESSES_A_CORE * cores)
    if devices > limit:
        raise ConfigError(
            f"instance.devices={devices}: this computer has {visible} GPUs and {cores} cores, and takes at most {limit}"
        )
