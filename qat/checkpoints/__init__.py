"""Checkpoints: quantized students on disk, read from two layouts and written in our own.

`native` is our folder, `v2` the state dict of the ANEMLL training scripts; docs/FORMATS.md describes both.
Whatever the layout, a student is the teacher with `QuantLinear` modules in it and a manifest that says
what they are.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qat.checkpoint_files import find
from qat.checkpoints import native, v2
from qat.checkpoints.native import FILE, describe, heritage, layers_of, save, write_tables
from qat.checkpoints.own import own_parameters, write_own
from qat.machine import Machine
from qat.models import ModelFolder

__all__ = [
    "FILE",
    "describe",
    "heritage",
    "latent",
    "layers_of",
    "load",
    "own_parameters",
    "save",
    "write_own",
    "write_tables",
]


def load(path: Path, teacher: ModelFolder, machine: Machine) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student of a checkpoint folder, a V2 state dict or a V2 folder, and its manifest.

    Raises:
        ArtifactError: the files are damaged, no checkpoint's, or do not belong to this teacher.
    """
    found = find(path)
    return (native if found.is_dir() else v2).load(found, teacher, machine)


def latent(path: Path) -> dict[str, Tensor]:
    """The weights [O, I] that a checkpoint's tables stand for, as `<layer>.weight`; empty where it has none.

    Raises:
        ArtifactError: the files are damaged or no checkpoint's.
    """
    found = find(path)
    return (native if found.is_dir() else v2).latent(found)
