"""A dense Hugging Face folder, written and read back by transformers."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qat import model_files, models
from qat.checkpoints.own import adopt, own_parameters
from qat.config import ExportConfig
from qat.export.moved import older_keys
from qat.export.source import CPU, DTYPES, Source, cast, copy_tokenizer
from qat.quant.linear import Quantized, QuantLinear, quantized
from qat.quant.places import matrix


def write(source: Source, folder: Path, settings: ExportConfig, replaced: Collection[str] = ()) -> None:
    """Writes the model with every quantized weight multiplied out, and with its adapter's added.

    Args:
        source: a student, or a teacher.
        folder: not published yet.
        settings: of the export.
        replaced: quantized layers that get other tensors afterwards, whose weights are the teacher's meanwhile.

    Raises:
        NumericsError: a weight does not fit into `export.dtype`.
    """
    model = dense(source, DTYPES[settings.dtype], replaced)
    model.save_pretrained(folder)
    described = model.config.to_dict() | {"dtype": settings.dtype.value}
    older = older_keys(described, model_files.settings(source.teacher.path), type(model.config))
    describe(folder, {key: value for key, value in older.items() if key not in model_files.settings(folder)})
    copy_tokenizer(source.teacher, folder)


def describe(folder: Path, more: dict[str, Any]) -> None:
    """Adds settings to the `config.json` of a folder that is not published yet."""
    text = json.dumps(model_files.settings(folder) | more, indent=2, ensure_ascii=False)
    (folder / model_files.CONFIG).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def dense(source: Source, dtype: torch.dtype, besides: Collection[str] = ()) -> PreTrainedModel:
    """The source as a plain model in another type; of layers `besides`, weights stay the teacher's, unchecked."""
    model = source.teacher.load(dtype, CPU)
    model.config.use_cache = source.teacher.settings().use_cache
    model.generation_config = GenerationConfig()  # the folder's own file is copied
    adopt(model, own_parameters(source.model))
    layers = quantized(source.model)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            cast(name, parameter, dtype)
    for name, module in layers.items():
        if name not in besides:
            matrix(model, name).copy_(cast(name, _merged(module), dtype))
    return model


def _merged(module: Quantized) -> Tensor:
    """A layer's weight [O, I] fp32, what its adapter adds included."""
    weight = module.weight(torch.float32)
    adapter = module.adapter if isinstance(module, QuantLinear) else None
    return weight if adapter is None else weight + adapter.weight()


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to."""
    return DTYPES[settings.dtype]


def read(source: Source, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, in the type it was written in."""
    return models.read(folder, "auto").eval()
