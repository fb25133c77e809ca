"""Grids that engines store: which layers of a student are on one, and which presets are. torch is not imported."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import OmegaConf

from qat.config import CONF, ROLES, USUAL_GROUPS
from qat.errors import ConfigError

BLOCK_OF_K_QUANTS = 256  # weights of a row that k-quants handle together; their presets name no group
JOINED = re.compile(r"\.experts\.\d+\.gate_up_proj$")  # transformers stacks what files have by themselves
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
            ConfigError: one is on another grid, and the sentence names the preset that would be on this one; or it is a
                matrix of an expert that files of its architecture have in two.
        """
        for name, layer in layers.items():
            if JOINED.search(name):
                raise ConfigError(
                    f"{self.engine} has no place for {name}, which files of this architecture have in two:"
                    " export=packed and export=hf take experts"
                )
            if layer.get("kind") in (None, *self.roles) and not self.holds(layer):
                fitting = fitting_preset(self.presets, layers, self.groups or USUAL_GROUPS)
                raise ConfigError(
                    f"{self.engine} cannot hold {name}, which is in {said(layer)}: {fitting}; export=hf is dense, and"
                    " takes any"
                )

    def holds(self, layer: Settings) -> bool:
        """Whether the engine stores such weights as they are."""
        return (
            layer.get("format") == "grid"
            and levels_of(layer) in self.levels
            and layer["bits"] in self.bits
            and (not self.groups or layer["group"] in self.groups)
        )


def fitting_preset(prefix: str, layers: Mapping[str, Settings], groups: Collection[int] = ()) -> str:
    """Words for the preset of an engine that is nearest to some layers.

    Its groups divide all rows; of several, its bits are nearest to those of the layers and its groups largest.

    Args:
        prefix: of the names of the engine's options in `conf/quant/`.
        layers: by name, each with its shape and the settings of its format.
        groups: that its presets may have instead of their own.
    """
    known = presets(prefix)
    sizes = {name: mlp.get("group", BLOCK_OF_K_QUANTS) for name, mlp in known.items()}
    rows = sorted({layer["shape"][1] for layer in layers.values()})
    fitting = [name for name, size in sizes.items() if all(row % size == 0 for row in rows)]
    others = [size for size in groups if all(row % size == 0 for row in rows)]
    if not fitting and not others:
        every = sorted({*sizes.values(), *groups})
        return f"its groups of {_listed(every)} do not divide rows of {_listed(rows)} weights"
    weights = {name: math.prod(layer["shape"]) for name, layer in layers.items()}
    mean = sum(layers[name]["bits"] * weights[name] for name in layers) / sum(weights.values())
    nearest = min(fitting or known, key=lambda name: (abs(known[name]["bits"] - mean), -sizes[name]))
    instead = "" if fitting else f" in groups of {max(others)}, quant.mlp.group={max(others)} and so on,"
    return f"a student made with quant={nearest}{instead} fits"


def presets(prefix: str) -> dict[str, Settings]:
    """The options in `conf/quant/` whose names begin with a prefix, each with what it makes of an MLP."""
    found = sorted(CONF.glob(f"quant/{prefix}*.yaml"))
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path))["mlp"] for path in found}  # type: ignore


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
