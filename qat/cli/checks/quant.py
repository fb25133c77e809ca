"""What layers are written in: every format has settings of its own, and those of another one would do nothing."""

from collections.abc import Iterator
from dataclasses import fields

from qat.cli.schema import written
from qat.config import ROLES, SETTINGS, Config, WeightConfig
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Each role of layers has the settings of its format, and no others.

    Raises:
        ConfigError: the first that is missing, or means nothing.
    """
    for key, given in _formats(config):
        own, name = SETTINGS[given.format], given.format.name
        for field in fields(given):
            value, where = getattr(given, field.name), f"{key}.{field.name}"
            if field.name in own and value is None:
                raise ConfigError(f"{where} is missing: {key}.format={name} needs it")
            if field.name not in (*own, "format") and value != field.default:
                raise ConfigError(
                    f"{where}={written(value)}: means nothing to {key}.format={name}, which has {', '.join(own)}: set"
                    f" {where}={written(field.default)}"
                )


def _formats(config: Config) -> Iterator[tuple[str, WeightConfig]]:
    """The formats of a run by their keys, those of a student that is trained first included."""
    quants = {"quant": config.quant} | ({"first.quant": config.first.quant} if config.first else {})
    for key, quant in quants.items():
        for role in ROLES:
            if (given := getattr(quant, role)) is not None:
                yield f"{key}.{role}", given
