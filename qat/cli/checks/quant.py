"""Checks formats of layers: each has its own settings, and settings of another format would have no effect.

A budget has a size and formats to choose from.
"""

from collections.abc import Iterator
from dataclasses import fields

from qat.cli.schema import written
from qat.config import ROLES, SETTINGS, Config, QuantConfig, WeightConfig
from qat.errors import ConfigError


def check(config: Config) -> None:
    """Checks that each format has its own settings and no others, and that a budget has one size.

    Raises:
        ConfigError: the first that is missing, or means nothing.
    """
    for where, quant in _quants(config).items():
        _check_budget(where, quant)
    for key, given in _named(config):
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


def _check_budget(where: str, quant: QuantConfig) -> None:
    sizes = [f"{where}.{name}" for name in ("megabytes", "bits") if getattr(quant, name) is not None]
    named = any(getattr(quant, role) for role in ROLES) or quant.layers
    if sizes and not quant.candidates and not named:
        raise ConfigError(
            f"{where}.candidates=[]: {sizes[0]} has no formats to choose from: name some, as in"
            f" {where}.candidates='[{{bits: 2, rank: 4}}, {{bits: 4, rank: 4}}]', or leave it out for those of"
            f" {where}=budget"
        )
    if sizes and not quant.candidates:
        raise ConfigError(f"{sizes[0]}: means nothing to {where}={quant.name}, which names formats: use {where}=budget")
    if quant.candidates and len(sizes) != 1:
        found = f"{' and '.join(sizes)} are two sizes" if sizes else "has no size to choose formats for"
        raise ConfigError(f"{where}={quant.name}: {found}: set {where}.megabytes=56, or {where}.bits=3.2")


def _quants(config: Config) -> dict[str, QuantConfig]:
    """The students of a run by their keys, one that is trained first included."""
    return {"quant": config.quant} | ({"first.quant": config.first.quant} if config.first else {})


def _named(config: Config) -> Iterator[tuple[str, WeightConfig]]:
    """The formats of a run by their keys."""
    for key, quant in _quants(config).items():
        named = {role: getattr(quant, role) for role in ROLES}
        named |= {f"layers[{pattern}]": given for pattern, given in quant.layers.items()}
        named |= {f"candidates[{number}]": given for number, given in enumerate(quant.candidates)}
        yield from ((f"{key}.{name}", given) for name, given in named.items() if given is not None)
