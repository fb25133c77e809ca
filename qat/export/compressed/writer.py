"""The layout `pack-quantized` of compressed-tensors: whole numbers around zero, times the scale of a group.

`weight_packed` has rows in words of 32 bits, the first weight lowest, each number as its distance from the least.
"""

import io
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import models
from qat.config import ExportConfig
from qat.export import replaced
from qat.export.replaced import exact
from qat.export.source import DTYPES, Source
from qat.quant import packing
from qat.quant.formats import GroupGrid
from qat.quant.linear import Quantized, QuantLinear, quantized

LAYOUT = "pack-quantized"


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes weights, `config.json` and the tokenizer.

    Raises:
        NumericsError: a number does not fit into `export.dtype`.
        ConfigError: as `replaced.write`.
    """
    dtype = DTYPES[settings.dtype]
    layers = linears(source)
    described = {"quantization_config": description(source, layers)}
    replaced.write(source, folder, settings, layers, lambda name, module: tensors(name, module, dtype), described)


def linears(source: Source) -> dict[str, Quantized]:
    """The quantized linear layers by name, which vLLM's reader knows packed; an embedding is written dense."""
    return {name: module for name, module in quantized(source.model).items() if isinstance(module, QuantLinear)}


def tensors(name: str, module: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight_packed` [O, I · bits / 32] int32, `weight_scale` [O, I / group], `weight_shape` [2] int64."""
    return {
        "weight_packed": packing.words(module.indices, module.format.bits),
        "weight_scale": exact(f"{name}.scale", module.normalized()["scale"], dtype),
        "weight_shape": torch.tensor([module.outputs, module.inputs]),
    }


def description(source: Source, layers: dict[str, Quantized]) -> dict[str, Any]:
    """`quantization_config`: layers by group and bits, and the linear layers that are dense."""
    formats = sorted({_numbers(module) for module in layers.values()})
    groups = {
        f"group_{number}": {
            "targets": [name for name, module in layers.items() if _numbers(module) == (group, bits)],
            "weights": {
                **{"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False},
                **{"strategy": "group", "group_size": group},
            },
            **{"input_activations": None, "output_activations": None, "format": LAYOUT},
        }
        for number, (group, bits) in enumerate(formats)
    }
    skeleton = source.teacher.skeleton()
    linear = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    return {
        **{"quant_method": "compressed-tensors", "format": LAYOUT, "quantization_status": "compressed"},
        **{"config_groups": groups, "ignore": [name for name in linear if name not in layers]},
        "version": version("compressed-tensors"),
    }


def _numbers(module: Quantized) -> tuple[int, int]:
    return cast(GroupGrid, module.format).group, module.format.bits


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to."""
    return DTYPES[settings.dtype]


def read(source: Source, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it with that library.

    Raises:
        ArtifactError: the library decodes other weights than the student has.
    """
    with redirect_stderr(io.StringIO()):  # the library's progress bars cannot be turned off
        model = models.read(folder, "auto").eval()
        for name, module in linears(source).items():
            replaced.require_equal(name, decoded(model.get_submodule(name)), module)
        cast(Any, model)(torch.zeros(1, 1, dtype=torch.long))  # the first forward pass unpacks the weights
    return model


def decoded(layer: Any) -> Tensor:
    """W [O, I] fp32 by the library's own decoder."""
    packed = {"weight_packed": layer.weight_packed, "weight_shape": layer.weight_shape}
    packed["weight_scale"] = layer.weight_scale.float()
    return PackedQuantizationCompressor.decompress(packed, layer.quantization_scheme)["weight"]
