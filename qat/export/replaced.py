"""Hugging Face folders in which quantized layers have an engine's tensors in the place of a dense `weight`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat import model_files
from qat.config import ExportConfig
from qat.errors import ArtifactError, ConfigError, NumericsError
from qat.export.hf import writer as hf
from qat.export.source import Source, cast
from qat.quant.linear import Quantized

# Makes a layer's tensors, keyed by what follows the layer's name.
Packed = Callable[[str, Quantized], dict[str, Tensor]]


@torch.no_grad()
def write(
    source: Source,
    folder: Path,
    settings: ExportConfig,
    layers: dict[str, Quantized],
    packed: Packed,
    described: dict[str, Any],
) -> None:
    """Writes the dense folder, whose names are those that an architecture was published with, and replaces weights.

    Args:
        source: a student.
        folder: not published yet.
        settings: of the export.
        layers: those of its quantized layers that the engine holds packed, by name.
        packed: makes an engine's tensors.
        described: what `config.json` says of them.

    Raises:
        NumericsError: a number does not fit into `export.dtype`.
        ConfigError: the architecture's files have a quantized layer under another name.
    """
    hf.write(source, folder, settings, layers)
    (file,) = model_files.weights(folder)
    tensors = load_file(file)
    for name, module in layers.items():
        if tensors.pop(f"{name}.weight", None) is None:
            raise ConfigError(
                f"export={settings.name}: files of this architecture have {name} under another name, so no engine would"
                " find it: export=hf is dense, and takes any"
            )
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in packed(name, module).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    hf.describe(folder, described)


def exact(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type that has the very same numbers.

    Raises:
        NumericsError: it has not.
    """
    made = cast(name, value, dtype)
    if not torch.equal(made.to(value.dtype), value):
        shown = str(dtype).removeprefix("torch.")
        raise NumericsError(f"{name} has numbers that {shown} would round: export with export.dtype=fp32")
    return made


def require_equal(name: str, decoded: Tensor, module: Quantized) -> None:
    """Compares what an engine's decoder makes of a layer's tensors with the student's own weight, both fp32.

    Raises:
        ArtifactError: one number differs.
    """
    if not torch.equal(decoded, module.weight(torch.float32)):
        raise ArtifactError(f"the engine decodes other weights of {name} than the student has: nothing was published")
