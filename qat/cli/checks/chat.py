"""Checks the settings of the chat: the temperature is 0 or large enough to divide by."""

from qat.config import Config
from qat.config.keys import COLD, HOT
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Checks that the temperature is 0 or at least the smallest one allowed."""
    if 0 < config.chat.temperature < COLD:
        raise ConfigError(f"chat.temperature={config.chat.temperature}: must be 0 or at least {COLD} and at most {HOT}")
