"""What the files of a model hold, by their headers: names and types, each once, and none that hides something else."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from qat import model_files, tensor_files
from qat.errors import ConfigError
from qat.models.reading import listed, understood

PLAIN = ("F64", "F32", "F16", "BF16")  # types that hold plain numbers, without scales
KINDS = dict(zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), PLAIN, strict=True))

# Buffers that older files store and newer models compute, by the names in transformers.
COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: its type as safetensors writes it (`F32`, `I8`), and the file."""

    kind: str
    file: Path


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of some files by name.

    Raises:
        ConfigError: a file cannot be read, or two hold a tensor of one name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with understood(f"{file} cannot be read: {model_files.REMEDY}"):
            kinds = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        for name, kind in kinds.items():
            if name in found:
                raise ConfigError(f"{file} and {found[name].file.name} both hold {name}: {model_files.REMEDY}")
            found[name] = Stored(kind, file)
    return found


def refuse_ambiguous(folder: Path, model: PreTrainedModel, tensors: dict[str, Stored]) -> None:
    """Refuses tensors that transformers might misinterpret.

    Args:
        folder: of the tensors.
        model: its names and types.
        tensors: what the files hold.

    Raises:
        ConfigError: two tensors are for one place, or numbers of a model that is said to be plain are quantized.
    """
    prefix = f"{model.base_model_prefix}."
    if both := sorted(name for name in tensors if prefix + name in tensors):
        raise ConfigError(f"{folder} holds both {both[0]} and {prefix}{both[0]}, which are one: {model_files.REMEDY}")
    wanted = model.state_dict()
    patterns = [*COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    found = [
        f"{name} ({tensor.kind})"
        for name, tensor in tensors.items()
        if tensor.kind not in PLAIN
        and not any(re.search(pattern, name) for pattern in patterns)
        and (name not in wanted or wanted[name].is_floating_point())
    ]
    if found:
        raise ConfigError(
            f"{folder} holds quantized numbers in {listed(found)}, and its config.json has no quantization_config that"
            " says what they stand for: name the model that they were made from"
        )


def refuse_unscaled(folder: Path, tensors: dict[str, Stored]) -> None:
    """Refuses 8-bit floating-point numbers without a scale beside them, which transformers takes as they are.

    Raises:
        ConfigError: by the names of the tensors.
    """
    scaled = {name.rpartition(".")[0] for name in tensors if "scale" in name.rpartition(".")[2]}
    found = [name for name, tensor in tensors.items() if tensor.kind.startswith("F8") and "scale" not in name]
    if bare := [name for name in found if name.rpartition(".")[0] not in scaled]:
        raise ConfigError(f"{folder} has no scale for {listed(bare)}: {model_files.REMEDY}")


def _safetensors(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118 - no mapping


def _pickled(file: Path) -> dict[str, str]:
    """Types as safetensors would write them; nothing but tensors is unpickled."""
    try:
        content = tensor_files.unpickled(file, "meta")
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read ({error}): save the model as safetensors") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no tensors by name: save the model as safetensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: KINDS.get(value.dtype, str(value.dtype)) for name, value in tensors.items()}
