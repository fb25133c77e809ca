"""Affine groups of MLX (`W = q · scale + bias`), words of 32 bits with the first weight lowest; read by mlx-lm itself.

mlx-lm takes the names of published files, and `config.json` says bits and group of every quantized layer.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import torch
from mlx_lm import utils
from mlx_lm.utils import load_model
from torch import Tensor, nn

from qat.config import ExportConfig
from qat.console import console
from qat.errors import ArtifactError
from qat.export import replaced
from qat.export.replaced import exact
from qat.export.source import DTYPES, Source
from qat.quant import packing
from qat.quant.formats import GroupGrid
from qat.quant.linear import Quantized, quantized


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes weights, `config.json` and the tokenizer.

    Raises:
        NumericsError: a number does not fit into `export.dtype`.
        ConfigError: as `replaced.write`.
    """
    dtype = DTYPES[settings.dtype]
    layers = quantized(source.model)
    if seen := ignored_window(source.teacher.settings().to_dict()):
        console.say(f"mlx-lm sees all tokens where this model sees {seen}: up to so many both are the same")
    described = dict.fromkeys(("quantization", "quantization_config"), description(layers))
    replaced.write(source, folder, settings, layers, lambda name, module: tensors(name, module, dtype), described)


def tensors(name: str, module: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight` [O, I · bits / 32] uint32, `scales` and `biases` [O, I / group] in the model's type."""
    format, parts = cast(GroupGrid, module.format), module.normalized()
    lowest = module.grid().values_NK.min()
    biases = parts["shift"] if format.shifts else parts["scale"] * lowest
    return {
        "weight": packing.words(module.indices, format.bits).view(torch.uint32),
        "scales": exact(f"{name}.scale", parts["scale"], dtype),
        "biases": exact(f"{name}.bias", biases, dtype),
    }


def description(layers: dict[str, Quantized]) -> dict[str, Any]:
    """`quantization` of `config.json`: of the first layer for all, and each layer's own by name."""
    each = {
        name: {"group_size": cast(GroupGrid, module.format).group, "bits": module.format.bits}
        for name, module in layers.items()
    }
    return {**next(iter(each.values())), "mode": "affine", **each}


def ignored_window(described: dict[str, Any]) -> int | None:
    """Tokens that attention of a model sees at most where mlx-lm lets it see all; None where it does as the model does.

    Its code asks `sliding_window`, and where it asks `layer_types` as well, these say which layers have one.
    """
    size, kinds = described.get("sliding_window"), described.get("layer_types")
    if not size or not described.get("use_sliding_window", True) or (kinds and "sliding_attention" not in kinds):
        return None
    asked = utils._get_classes(described)[1].__dataclass_fields__
    heeds = "sliding_window" in asked and (bool(kinds) or "layer_types" not in asked)
    return None if heeds else int(size)


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to."""
    return DTYPES[settings.dtype]


def read(source: Source, folder: Path) -> "Loaded":
    """The model as mlx-lm loads it, computed in fp32.

    Raises:
        ArtifactError: MLX decodes other weights than the student has, or cannot make the model of its settings.
    """
    try:
        model, described = load_model(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"mlx-lm cannot make this model ({error!s:.200}): nothing was published; export=hf and export=packed"
            " are for transformers"
        ) from error
    arrays = dict(cast(Any, model).named_modules())
    for name, module in quantized(source.model).items():
        replaced.require_equal(name, decoded(arrays[name], described["quantization"][name]), module)
    cast(Any, model).set_dtype(mx.float32)  # MLX computes fp16 about fifty times more slowly on CPUs
    return Loaded(model)


def decoded(layer: Any, settings: dict[str, int]) -> Tensor:
    """W [O, I] fp32 by MLX's own decoder."""
    scales, biases = (getattr(layer, part).astype(mx.float32) for part in ("scales", "biases"))
    weight = mx.dequantize(layer.weight, scales, biases, settings["group_size"], settings["bits"])
    return torch.from_numpy(np.array(weight))


class Loaded(nn.Module):
    """A model of mlx-lm that is asked for logits like one of transformers."""

    dtype = torch.float32  # type of the logits it returns; it computes in the model's own type

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Any:
        """`logits` [B, T, V], fp32."""
        logits = self.model(mx.array(ids_BT.numpy())).astype(mx.float32)
        return SimpleNamespace(logits=torch.from_numpy(np.array(logits)))
