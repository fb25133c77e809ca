"""Files of engines: what an engine makes of the teacher, ours on its grid, and both as its own decoder reads them."""

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import preset
from evaluation import digest
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import models
from qat.config import ExportConfig, ExportType, WeightConfig
from qat.errors import ConfigError, UnavailableError
from qat.export.gguf import FILE
from qat.export.gguf.types import type_of
from qat.export.source import CPU, Source
from qat.models import ModelFolder
from qat.quant.places import matrix

IMPORTANCE = "importance.npz"
MIXED = {f"Q{bits}_K": f"Q{bits}_K_M" for bits in (3, 4, 5)}  # what llama.cpp means by these names of files

# Gives a folder that is filled once, by its label and what shapes its content.
Kept = Callable[[str, dict[str, Any], Callable[[Path], None]], Path]


@dataclass(frozen=True)
class Engine:
    """Who runs a file.

    Attributes:
        label: what tables call it.
        export: the option of `conf/export/` that writes for it.
        dtype: of what its files hold in full.
        files: which of a folder's files hold weights.
        package: what its own quantizer comes with; None is a format without a quantizer.
    """

    label: str
    export: str
    dtype: ExportType
    files: str
    package: str | None


ENGINES = {  # by how presets on their grids begin
    "gguf": Engine("llama.cpp", "gguf", ExportType.fp16, FILE, "llama-cpp-python"),
    "mlx": Engine("MLX", "mlx", ExportType.fp16, "*.safetensors", "mlx-lm"),
    "compressed": Engine("compressed-tensors", "compressed", ExportType.fp16, "*.safetensors", None),
}


def engine_of(name: str) -> Engine:
    """The engine that a preset is for.

    Raises:
        ConfigError: it is for none.
    """
    if (engine := ENGINES.get(name.partition("_")[0])) is None:
        known = ", ".join(f"{prefix}_…" for prefix in ENGINES)
        raise ConfigError(f"quant={name} is on no engine's grid: presets of engines begin with {known}")
    return engine


def size(engine: Engine, folder: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.stat().st_size for file in folder.glob(engine.files))


def write_ours(engine: Engine, source: Source, folder: Path) -> None:
    """Writes a student as `launch.py stage=export` does, and lets the engine's decoder prove every weight.

    Raises:
        ConfigError: the student is not on the engine's grid.
        ArtifactError: the decoder gives another weight than the student has.
    """
    writer = importlib.import_module(f"qat.export.{engine.export}.writer")
    writer.write(source, folder, ExportConfig(engine.export, engine.export, engine.dtype))
    writer.read(source, folder)


def write_own(engine: Engine, teacher: ModelFolder, name: str, text_NL: Tensor, folder: Path, kept: Kept) -> None:
    """Lets the engine's own quantizer write the teacher in the type that a preset is named after.

    Args:
        engine: whose quantizer.
        teacher: what it quantizes.
        name: the preset.
        text_NL: rows of tokens that it may look at.
        folder: where to write.
        kept: keeps what several types are made from.

    Raises:
        UnavailableError: it has none, or it is not installed.
    """
    if engine.package is None:
        raise UnavailableError(f"{engine.label} is a format without a quantizer of its own")
    try:
        OWN[engine.export](teacher, name, text_NL, folder, kept)
    except (ImportError, OSError) as error:
        told = f"{engine.label}'s own quantizer cannot run here ({error}): pip install {engine.package}"
        raise UnavailableError(told) from None


def read(engine: Engine, teacher: ModelFolder, folder: Path) -> PreTrainedModel:
    """The model in fp32 with the weights that the engine's decoder finds in a folder."""
    return READERS[engine.export](teacher, folder)


def _own_gguf(teacher: ModelFolder, name: str, text_NL: Tensor, folder: Path, kept: Kept) -> None:
    from peers import llamacpp

    def prepare(scratch: Path) -> None:
        llamacpp.write(teacher, scratch / FILE)
        np.savez(scratch / IMPORTANCE, **llamacpp.importance(teacher, text_NL))

    made = kept("gguf_dense", {"text": digest(text_NL)}, prepare)
    kind, embedding = (_type(role) for role in (preset(name).mlp, preset(name).embed))
    with np.load(made / IMPORTANCE) as importance:
        llamacpp.quantize(made / FILE, folder / FILE, MIXED.get(kind, kind), embedding, dict(importance))


def _type(weight: WeightConfig | None) -> str:
    """llama.cpp's type of a preset's weights."""
    assert weight is not None
    levels = weight.levels.name
    kind = type_of({"format": weight.format.name, "bits": weight.bits, "group": weight.group, "levels": levels})
    assert kind is not None
    return kind


def _own_mlx(teacher: ModelFolder, name: str, text_NL: Tensor, folder: Path, kept: Kept) -> None:
    from peers import mlx

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        mlx.quantize(teacher, Path(scratch) / "model", *grid_of(name))
        for file in (Path(scratch) / "model").iterdir():
            file.rename(folder / file.name)


def grid_of(name: str) -> tuple[int, int]:
    """Bits and group of a preset's grid, which is one for all layers."""
    mlp = preset(name).mlp
    assert isinstance(mlp, WeightConfig) and mlp.group is not None
    return mlp.bits, mlp.group


def _read_gguf(teacher: ModelFolder, folder: Path) -> PreTrainedModel:
    from qat.export.gguf import writer

    return writer.read(Source(teacher, teacher.load(torch.float32, CPU)), folder)


def _read_mlx(teacher: ModelFolder, folder: Path) -> PreTrainedModel:
    from peers import mlx

    return mlx.read(teacher, folder).model


@torch.no_grad()
def _read_compressed(teacher: ModelFolder, folder: Path) -> PreTrainedModel:
    from qat.export.compressed import writer

    model, packed = teacher.load(torch.float32, CPU), models.read(folder, "auto")
    there = dict(packed.named_parameters())
    for name, parameter in model.named_parameters():
        if name in there:
            parameter.copy_(there[name])
    for name, module in packed.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_packed"):
            matrix(model, name).copy_(writer.decoded(module))
    return model


OWN: dict[str, Callable[[ModelFolder, str, Tensor, Path, Kept], None]] = {"gguf": _own_gguf, "mlx": _own_mlx}
READERS: dict[str, Callable[[ModelFolder, Path], PreTrainedModel]] = {
    "gguf": _read_gguf,
    "mlx": _read_mlx,
    "compressed": _read_compressed,
}
