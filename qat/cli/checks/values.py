"""Checks each value by what its field allows; new keys need no code here."""

import math

from qat.config import Config
from qat.config.keys import Value, values
from qat.errors import ConfigError
from qat.suggest import did_you_mean

LARGEST = 2**63 - 1  # largest integer that torch (int64) and readers of JSON can hold


def check(config: Config) -> None:
    """Checks that numbers are finite and within bounds, and that a text with fixed choices is one of them.

    Raises:
        ConfigError: the first that is not.
    """
    for found in values(config):
        if isinstance(found.value, int | float):
            _check_number(found, found.value)
        elif found.said.words and found.value is not None:
            _check_word(found, found.value)


def _check_number(found: Value, number: float) -> None:
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise ConfigError(f"{found.name}={number}: must be an ordinary finite number")
    if not found.said.bound.holds(number):
        raise ConfigError(f"{found.name}={number}: must be {found.said.bound}")


def _check_word(found: Value, word: str) -> None:
    *others, last = found.said.words
    if word not in (*others, last):
        raise ConfigError(
            f"{found.name}={word}: must be {', '.join(others)} or {last}{did_you_mean(word, found.said.words)}"
        )
