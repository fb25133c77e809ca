"""What layers are written in: every format has settings of its own, and those of another one would do nothing."""

from collections.abc import Iterator

from qat.config import SETTINGS, Config, WeightConfig
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Each kind of layers has the settings of its format, and no others.

    Raises:
        ConfigError: the first that is missing, or means nothing.
    """
    for key, given in _kinds(config):
        own, name = SETTINGS[given.format], given.format.name
        for setting in ("rank", "group", "shifts"):
            value = getattr(given, setting)
            if setting not in own and value is not None:
                raise ConfigError(
                    f"{key}.{setting}={str(value).lower()}: means nothing to {key}.format={name}, which has"
                    f" {', '.join(own)}; set it to null"
                )
            if setting in own and value is None and setting != "shifts":
                raise ConfigError(f"{key}.{setting} is missing: {key}.format={name} needs it")


def _kinds(config: Config) -> Iterator[tuple[str, WeightConfig]]:
    """The formats of a run by their keys, those of a student that is trained first included."""
    quants = {"quant": config.quant} | ({"first.quant": config.first.quant} if config.first else {})
    for key, quant in quants.items():
        for kind, given in {"mlp": quant.mlp, "attn": quant.attn}.items():
            if given is not None:
                yield f"{key}.{kind}", given
