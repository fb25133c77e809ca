"""Packed tensors: indices as the bit stream of `qat.quant.packing`, parts of formats in fp16, all else as asked.

Embedding and head that are not quantized are rounded to 8 bits, unless `export.dense` keeps them as they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qat import model_files, models
from qat.config import ExportConfig, ExportType
from qat.export.moved import older_keys
from qat.export.source import DTYPES, Source, cast, copy_tokenizer
from qat.packed import FILE, METHOD
from qat.packed.linear import SIXTEEN, stored
from qat.quant import packing, size
from qat.quant.architectures import Layer
from qat.quant.embedding import empty
from qat.quant.linear import Quantized, quantized

ROWS = 1 << 13  # rows of a matrix that are rounded at a time


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes tensors, `config.json` and the tokenizer.

    Raises:
        NumericsError: a value does not fit into its type.
    """
    dtype = DTYPES[settings.dtype]
    besides = [] if settings.dense else size.rounded(source.layers, source.teacher.skeleton())
    save_file(tensors(source, dtype, besides), folder / FILE, metadata=size.METADATA)
    text = json.dumps(description(source, dtype, besides), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    copy_tokenizer(source.teacher, folder)


@torch.no_grad()
def tensors(source: Source, dtype: torch.dtype, besides: Sequence[Layer] = ()) -> dict[str, Tensor]:
    """Every tensor by its name in the loaded model, tied parameters once; layers in `besides` are rounded."""
    modules = quantized(source.model)
    modules |= {layer.name: rounded(layer, source.model.get_parameter(f"{layer.name}.weight")) for layer in besides}
    made: dict[str, Tensor] = {}
    for name, module in modules.items():
        bits = module.format.indices(module.outputs, module.inputs).bits
        made[f"{name}.indices"] = packing.pack(module.indices, bits)
        parts = module.format.parts(module.outputs, module.inputs)
        for part, value in module.normalized().items():
            made[f"{name}.{part}"] = stored(parts[part], cast(name, value, SIXTEEN)).contiguous()
    for name, parameter in source.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in modules or leaf == "bias":
            made[name] = cast(name, parameter, dtype).contiguous()
    return made


def rounded(layer: Layer, weight_OI: Tensor) -> Quantized:
    """A matrix on a grid of groups, in each of which the outermost value reaches the largest weight."""
    made, scale_OG = empty(layer), torch.ones(layer.format.parts(*layer.shape)["scale"].shape, dtype=torch.float32)
    outermost = layer.format.grid({"scale": scale_OG[:1]}).values_NK.max()
    for rows in torch.arange(len(weight_OI)).split(ROWS):
        weight = weight_OI[rows].float()
        scale = layer.format.stored({"scale": weight.unflatten(1, (scale_OG.shape[1], -1)).abs().amax(2) / outermost})
        scale_OG[rows], made.indices[rows] = scale["scale"], layer.format.grid(scale).nearest(weight)
    made.set_parts({"scale": scale_OG})
    return made


def description(source: Source, dtype: torch.dtype, besides: Sequence[Layer] = ()) -> dict[str, Any]:
    """`config.json`: the architecture's own, wrapped so that plain transformers refuses it."""
    settings = source.teacher.settings()
    base = settings.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    base |= {"architectures": [type(source.model).__name__]}
    base |= older_keys(base, model_files.settings(source.teacher.path), type(settings))
    layers = [*source.layers, *besides]
    formats = {layer.name: layer.format.settings() for layer in layers}
    method = {"quant_method": METHOD, "bits_per_weight": round(size.bits_per_weight(layers), 4), "layers": formats}
    return {"model_type": METHOD, "base_config": base, "quantization_config": method}


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to: parts of formats are fp16 in any case, and 8 bits are bf16's."""
    return SIXTEEN if settings.dense and settings.dtype is not ExportType.bf16 else torch.bfloat16


def read(source: Source, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it once this package is imported."""
    return models.read(folder, "auto").eval()
