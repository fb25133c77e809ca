"""Checks the machine: it has enough GPUs or CPU cores for all processes."""

from qat import gpus, system
from qat.config import Config
from qat.errors import ConfigError

PROCESSES_A_CORE = 4  # allowed processes per CPU core where GPUs are fewer: more would only wait for each other


def check(config: Config) -> None:
    """Checks that there are no more processes than this computer can run."""
    devices, visible, cores = config.instance.devices, len(gpus.visible()), system.cores()
    limit = max(visible, PROCESSES_A_CORE * cores)
    if devices > limit:
        raise ConfigError(
            f"instance.devices={devices}: this computer has {visible} GPUs and {cores} cores, and takes at most {limit}"
        )
