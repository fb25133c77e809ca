"""llama.cpp's types that hold weights of our formats exactly. Nothing here imports torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qat.errors import ConfigError
from qat.export.grids import Settings, fitting_preset, levels_of, said

PRESETS = "gguf_"  # prefix of the options in `conf/quant/` that are in these types
EXPERT = re.compile(r"\.\d+\.(?=\w+$)")  # what a layer of a stack of experts has in its name and the stack has not
GRIDS = {  # by levels and bits
    ("integers", 2): "Q2_0",
    ("integers", 4): "Q4_0",
    ("shifted", 4): "Q4_1",
    ("integers", 5): "Q5_0",
    ("shifted", 5): "Q5_1",
    ("integers", 8): "Q8_0",
    ("iq4nl", 4): "IQ4_NL",
}


def block(kind: str) -> int:
    """Weights of a row that share a scale, in types without blocks of 256."""
    return 64 if kind == "Q2_0" else 32


def type_of(layer: Settings) -> str | None:
    """The type that holds a layer in a format, of which manifests have the settings; None: none does.

    A group of several blocks is one scale that each of them repeats.
    """
    if layer.get("format") == "kquant":
        return f"Q{layer['bits']}_K"
    if layer.get("format") != "grid":
        return None
    kind = GRIDS.get((levels_of(layer), layer["bits"]))
    return kind if kind and layer["group"] % block(kind) == 0 else None


@dataclass(frozen=True)
class Types:
    """What a GGUF file holds of a student as it is."""

    def refuse(self, layers: Mapping[str, Settings]) -> None:
        """Looks at layers by name, each with its shape and the settings of its format.

        Raises:
            ConfigError: one is in no type of llama.cpp, and the sentence names the preset that would be; or experts
                that llama.cpp has in one tensor are in several.
        """
        stacks: dict[str, str | None] = {}
        for name, layer in layers.items():
            if type_of(layer) is None:
                raise ConfigError(
                    f"llama.cpp cannot hold {name}, which is in {said(layer)}: {fitting_preset(PRESETS, layers)}, and"
                    " export.dense=true writes it out in export.dtype"
                )
            stack = EXPERT.sub(".", name)
            if stack != name and stacks.setdefault(stack, type_of(layer)) != type_of(layer):
                raise ConfigError(
                    f"llama.cpp has the experts of {stack} in one tensor, and {name} is in {said(layer)}, others not:"
                    " give all of them one format"
                )
