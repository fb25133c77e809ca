"""The chat: a temperature is one, or none at all."""

from qat.config import Config
from qat.config.keys import COLD, HOT
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Below the least temperature only 0 is one."""
    if 0 < config.chat.temperature < COLD:
        raise ConfigError(f"chat.temperature={config.chat.temperature}: must be 0 or at least {COLD} and at most {HOT}")
