"""Checkpoints: quantized students on disk, read from two layouts and written in our own.

`native` is our folder, `v2` the state dict of the ANEMLL training scripts; docs/FORMATS.md describes both.
Whatever the layout, a student is the teacher with `QuantLinear` modules in it and a manifest that says
what they are.
"""

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qat.artifacts import content_key, open_artifact
from qat.checkpoint_files import find
from qat.checkpoints import native, v2
from qat.checkpoints.adapters import adaptable, copy_adapters
from qat.checkpoints.native import FILE, Shelf, describe, entries, has_formats, heritage, layers_of, save, write
from qat.checkpoints.own import own_parameters, write_own
from qat.machine import Machine
from qat.models import ModelFolder

__all__ = [
    "FILE",
    "Shelf",
    "adaptable",
    "check",
    "copy_adapters",
    "describe",
    "entries",
    "has_formats",
    "heritage",
    "identity",
    "latent",
    "layers_of",
    "load",
    "manifest",
    "own_parameters",
    "save",
    "write",
    "write_own",
]


def load(
    path: Path, teacher: ModelFolder, machine: Machine, latents: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student of a checkpoint folder, a V2 state dict or a V2 folder, and its manifest.

    With `latents` its layers have latent weights: the checkpoint's, else some near the teacher's (`qat.quant.latent`).

    Raises:
        ArtifactError: the files are damaged, no checkpoint's, or do not belong to this teacher.
    """
    found = find(path)
    model, described = (native if found.is_dir() else v2).load(found, teacher, machine)
    if latents:
        native.add_latents(model, latent(found), teacher)
    return model, described


def manifest(path: Path, teacher: ModelFolder, machine: Machine) -> dict[str, Any]:
    """What the manifest of a checkpoint says; for a V2 state dict the file has to be read.

    Raises:
        ArtifactError: as `load`.
    """
    found = find(path)
    return native.opened(found) if found.is_dir() else v2.load(found, teacher, machine)[1]


def check(path: Path, teacher: ModelFolder) -> None:
    """Checks that a checkpoint exists and is of this teacher; of a V2 state dict the latter shows only on loading.

    Raises:
        ArtifactError: the files are damaged or no checkpoint's, or it belongs to another teacher.
    """
    found = find(path)
    if found.is_dir():
        native.check(found, teacher)


def latent(path: Path) -> dict[str, Tensor]:
    """The latent weights [O, I] of the quantized layers, by name; empty where the checkpoint has none.

    Raises:
        ArtifactError: the files are damaged or no checkpoint's.
    """
    found = find(path)
    return (native if found.is_dir() else v2).latent(found)


def identity(path: Path) -> str:
    """A key of a checkpoint's content, to tell whether what was made from it is still up to date.

    Raises:
        ArtifactError: the files are damaged or no checkpoint's.
    """
    found = find(path)
    if found.is_dir():
        return content_key(open_artifact(found).manifest["files"])
    with open(found, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
