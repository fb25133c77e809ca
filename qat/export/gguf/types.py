"""llama.cpp's types that hold weights of our formats exactly. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from qat.config import CONF
from qat.errors import ConfigError
from qat.export.grids import Settings, levels_of, said

BLOCK = 32  # weights of a row that share a scale, in types without blocks of 256
GRIDS = {  # by levels and bits
    ("integers", 4): "Q4_0",
    ("shifted", 4): "Q4_1",
    ("integers", 5): "Q5_0",
    ("shifted", 5): "Q5_1",
    ("integers", 8): "Q8_0",
    ("iq4nl", 4): "IQ4_NL",
}


def type_of(layer: Settings) -> str | None:
    """The type that holds a layer in a format, of which manifests have the settings; None: none does.

    A group of several blocks is one scale that each of them repeats.
    """
    if layer.get("format") == "kquant":
        return f"Q{layer['bits']}_K"
    if layer.get("format") != "grid" or layer["group"] % BLOCK:
        return None
    return GRIDS.get((levels_of(layer), layer["bits"]))


@dataclass(frozen=True)
class Types:
    """What a GGUF file holds of a student as it is."""

    presets: str = "gguf_"

    def refuse(self, layers: Mapping[str, Settings]) -> None:
        """Looks at layers by name, each with its shape and the settings of its format.

        Raises:
            ConfigError: one is in no type of llama.cpp; the sentence names the preset that would be.
        """
        for name, layer in layers.items():
            if type_of(layer) is None:
                raise ConfigError(
                    f"llama.cpp cannot hold {name}, which is in {said(layer)}: {self._remedy(layers)}, and"
                    " export.dense=true writes it out in export.dtype"
                )

    @cached_property
    def options(self) -> dict[str, Any]:
        """The presets in types of llama.cpp, with what they make of an MLP."""
        found = sorted(CONF.glob(f"quant/{self.presets}*.yaml"))
        return {path.stem: OmegaConf.to_container(OmegaConf.load(path))["mlp"] for path in found}  # type: ignore

    def _remedy(self, layers: Mapping[str, Settings]) -> str:
        """The preset whose blocks divide all rows and whose bits are nearest to those of the layers."""
        weights = {name: layer["shape"][0] * layer["shape"][1] for name, layer in layers.items()}
        mean = sum(layers[name]["bits"] * weights[name] for name in layers) / sum(weights.values())
        rows = {layer["shape"][1] for layer in layers.values()}
        sizes = {name: option.get("group", 256) for name, option in self.options.items()}
        fitting = [name for name, size in sizes.items() if all(row % size == 0 for row in rows)]
        if not fitting:
            listed = " or ".join(map(str, sorted(rows)))
            return f"its types have blocks of 32 or 256, which do not divide rows of {listed} weights"
        nearest = min(fitting, key=lambda name: (abs(self.options[name]["bits"] - mean), -sizes[name]))
        return f"a student made with quant={nearest} fits"
