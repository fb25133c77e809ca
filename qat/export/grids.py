"""Grids that engines store: which layers of a student are on one, and which presets are. torch is not imported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from omegaconf import OmegaConf

from qat.config import CONF, ROLES
from qat.errors import ConfigError

Settings = Mapping[str, Any]  # settings of a format, as in manifests


class LayerRule(Protocol):
    """Which weights an engine holds as they are."""

    def refuse(self, layers: Mapping[str, Settings]) -> None:
        """Raises a `ConfigError` for a layer, of those by name with shape and settings, that it does not hold."""


@dataclass(frozen=True)
class EngineGrid:
    """Weights that an engine holds: whole numbers of some bits times a scale, perhaps shifted, in groups of a row.

    Attributes:
        engine: what runs them.
        levels: of the format `grid`, those that are the engine's.
        bits: of a whole number.
        groups: weights that share a scale; none where any number of them may.
        presets: how the names of options in `conf/quant/` begin that are on this grid.
        roles: of layers that the engine holds so; others are written dense.
    """

    engine: str
    levels: tuple[str, ...]
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    presets: str
    roles: tuple[str, ...] = ROLES

    def refuse(self, layers: Mapping[str, Settings]) -> None:
        """Looks at layers by name, each with its shape and the settings of its format.

        Raises:
            ConfigError: one is on another grid; the sentence names the preset that would be on this one.
        """
        for name, layer in layers.items():
            if layer.get("kind") in (None, *self.roles) and not self.holds(layer):
                raise ConfigError(
                    f"{self.engine} cannot hold {name}, which is in {said(layer)}: {self._remedy(layers)}; export=hf"
                    " is dense, and takes any"
                )

    def holds(self, layer: Settings) -> bool:
        """Whether the engine stores such weights as they are."""
        return (
            layer.get("format") == "grid"
            and levels_of(layer) in self.levels
            and layer["bits"] in self.bits
            and (not self.groups or layer["group"] in self.groups)
        )

    @cached_property
    def options(self) -> dict[str, Settings]:
        """The presets that are on this grid, with what they make of an MLP."""
        found = sorted(CONF.glob(f"quant/{self.presets}*.yaml"))
        return {path.stem: OmegaConf.to_container(OmegaConf.load(path))["mlp"] for path in found}  # type: ignore

    def _remedy(self, layers: Mapping[str, Settings]) -> str:
        """The preset with groups that divide all rows whose bits are nearest to those of the layers."""
        weights = {name: layer["shape"][0] * layer["shape"][1] for name, layer in layers.items()}
        mean = sum(layers[name]["bits"] * weights[name] for name in layers) / sum(weights.values())
        rows = {layer["shape"][1] for layer in layers.values()}
        fitting = {
            name: option for name, option in self.options.items() if all(row % option["group"] == 0 for row in rows)
        }
        if not fitting:
            groups = sorted({option["group"] for option in self.options.values()})
            return f"and groups of {_listed(groups)} do not divide its rows of {_listed(sorted(rows))} weights"
        nearest = min(fitting, key=lambda name: abs(fitting[name]["bits"] - mean))
        return f"a student made with quant={nearest} fits"


def levels_of(layer: Settings) -> str:
    """The levels of a grid; older files say whether there are shifts."""
    return str(layer.get("levels") or ("shifted" if layer.get("shifts") else "halves"))


def said(layer: Settings) -> str:
    """A format with its settings, in words."""
    return ", ".join(f"{key} {_plain(value)}" for key, value in _settings(layer))


def _settings(layer: Settings) -> Iterator[tuple[str, Any]]:
    yield "format", layer.get("format", "codebook")
    yield from ((key, value) for key, value in layer.items() if key not in ("format", "shape", "kind"))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
