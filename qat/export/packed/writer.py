"""Packed tensors: indices as the bit stream of `qat.quant.packing`, parts of formats in fp16, all else as asked."""

import json
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
from qat.quant import packing
from qat.quant.linear import quantized


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes tensors, `config.json` and the tokenizer.

    Raises:
        NumericsError: a value does not fit into its type.
    """
    dtype = DTYPES[settings.dtype]
    save_file(tensors(source, dtype), folder / FILE, metadata={"format": "pt"})
    text = json.dumps(description(source, dtype), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    copy_tokenizer(source.teacher, folder)


@torch.no_grad()
def tensors(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor by its name in the loaded model; tied parameters once."""
    modules = quantized(source.model)
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


def description(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`: the architecture's own, wrapped so that plain transformers refuses it."""
    settings = source.teacher.settings()
    base = settings.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    base |= {"architectures": [type(source.model).__name__]}
    base |= older_keys(base, model_files.settings(source.teacher.path), type(settings))
    layers = {layer.name: layer.format.settings() for layer in source.layers}
    method = {"quant_method": METHOD, "bits_per_weight": source.quant["bits_per_weight"], "layers": layers}
    return {"model_type": METHOD, "base_config": base, "quantization_config": method}


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to: the parts of formats are fp16 in any case."""
    return torch.bfloat16 if settings.dtype is ExportType.bf16 else SIXTEEN


def read(source: Source, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it once this package is imported."""
    return models.read(folder, "auto").eval()
