"""MLX: affine rounding to the nearest in groups, embedding included, as `mlx_lm.convert --quantize` does it."""

import contextlib
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.convert import convert
from mlx_lm.utils import load_model
from safetensors import safe_open

from peers.stored import Stored
from qat.export.mlx.writer import decoded
from qat.export.source import CPU
from qat.models import ModelFolder

SETTINGS = {"scales": "float16"}


def quantize(folder: ModelFolder, target: Path, bits: int, group: int) -> None:
    """Writes a folder that mlx-lm loads; `target` must not be there yet."""
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
        convert(
            str(folder.path.resolve()),
            str(target),
            quantize=True,
            q_bits=bits,
            q_group_size=group,
            dtype=SETTINGS["scales"],
        )


@torch.no_grad()
def read(folder: ModelFolder, target: Path) -> Stored:
    """A folder of MLX, decoded by MLX."""
    layers, model = dict(load_model(target)[0].named_modules()), folder.load(torch.float32, CPU)
    held, sizes = _bytes(target), {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = layers[owner]
        if leaf == "weight" and hasattr(layer, "scales"):
            parameter.copy_(decoded(layer, {"group_size": layer.group_size, "bits": layer.bits}))
            sizes[name] = sum(held[f"{owner}.{part}"] for part in ("weight", "scales", "biases"))
        else:
            parameter.copy_(_tensor(layer[leaf]))
            sizes[name] = held[name]
    return Stored(model, sizes, sum(file.stat().st_size for file in target.glob("*.safetensors")))


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def _bytes(target: Path) -> dict[str, int]:
    """Bytes of every tensor in a folder by name."""
    found = {}
    for path in target.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found
