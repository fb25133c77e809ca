"""Models off the disk, whole: what transformers would fill up or pass over in silence is refused by name.

It fills parameters that no file has with random numbers and passes over tensors that it has no place for; it
says so in a log that is silenced here.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qat import faults, model_files
from qat.errors import ConfigError, reason

SAFE = {"local_files_only": True, "trust_remote_code": False}
NAMED = 3  # tensors in a message

# What transformers and what it stands on raise for a folder that they cannot make sense of.
CONFUSED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
    *(ArithmeticError, AssertionError, EOFError, SafetensorError, UnpicklingError),
)

# Buffers that older files hold and newer models compute, as transformers has it.
COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: its type as safetensors writes it (`F32`, `I8`), and the file."""

    kind: str
    file: Path


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turns what goes wrong inside over someone's files into one sentence.

    Raises:
        ConfigError: `what`, with the reason.
    """
    try:
        yield
    except CONFUSED as error:
        if faults.explain(error):  # the machine's fault, no file's
            raise
        raise ConfigError(f"{what} ({reason(error)})") from None


def settings(folder: Path) -> PreTrainedConfig:
    """Its `config.json`.

    Raises:
        ConfigError: transformers does not know the architecture, or cannot use the values.
    """
    with understood(f"{folder / model_files.CONFIG} does not describe a model that transformers can compute"):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder, **SAFE))


def skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model of a configuration, without memory behind it: names, shapes and types.

    Raises:
        ConfigError: its values make no model.
    """
    with understood(f"{folder / model_files.CONFIG} makes no model"), torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def read(
    folder: Path,
    dtype: torch.dtype | str,
    auto: Any = AutoModelForCausalLM,
    failing: str = "cannot be loaded",
    **how: Any,
) -> PreTrainedModel:
    """A model of a folder, every parameter of it as it lies there, in `dtype` on the CPU.

    Args:
        folder: with files as `save_pretrained` leaves them.
        dtype: `"auto"` takes the one the folder names.
        auto: what chooses the class, or the class itself.
        failing: said of a folder that transformers cannot read.
        how: further arguments of `from_pretrained`.

    Raises:
        ConfigError: a tensor is missing, has no place, is misshapen or holds integers; or a file is damaged.
    """
    with understood(f"{folder} {failing}"):
        model, report = auto.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE | how
        )
    refuse_incomplete(folder, model, report)
    return cast(PreTrainedModel, model)


def refuse_incomplete(folder: Path, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuses a model that does not hold what its files hold.

    Raises:
        ConfigError: by the names of the tensors.
    """
    misshapen = {name: f"{list(there)} instead of {list(wanted)}" for name, there, wanted in report["mismatched_keys"]}
    found = {
        "lacks": sorted({*report["missing_keys"], *_on_meta(model)}),
        "has tensors of another shape than config.json says,": [f"{n} {said}" for n, said in misshapen.items()],
        "has tensors that the model of its config.json has no place for:": sorted(report["unexpected_keys"]),
    }
    for what, names in found.items():
        if names:
            raise ConfigError(f"{folder} {what} {listed(names)}: it is not all of one model, so save or copy it again")


def refuse_not_finite(folder: Path, model: nn.Module) -> None:
    """Refuses NaN and infinity in parameters and buffers, in one pass over them.

    Raises:
        ConfigError: by the names of the tensors.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    numbers = {name: tensor for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()}
    ends = torch.stack([torch.stack(tensor.detach().aminmax()).float() for tensor in numbers.values()])
    finite = ends.isfinite().all(1).tolist()
    if not all(finite):
        names = [name for name, fine in zip(numbers, finite, strict=True) if not fine]
        half = next(model.parameters()).dtype is torch.float16
        how = " in float16: try instance.precision=bf16 or fp32" if half else ": the folder is damaged"
        raise ConfigError(f"{folder} has numbers that are NaN or infinite in {listed(names)}{how}")


def refuse_integers(folder: Path, model: nn.Module, tensors: dict[str, Stored]) -> None:
    """Refuses integers where the model has floating-point numbers: they are quantized, and nothing says how.

    Raises:
        ConfigError: by the names of the tensors.
    """
    wanted = model.state_dict()
    patterns = [*COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    integers = [name for name, tensor in tensors.items() if not tensor.kind.startswith(("F", "BF"))]
    found = [
        name
        for name in integers
        if not any(re.search(pattern, name) for pattern in patterns)
        and (name not in wanted or wanted[name].is_floating_point())
    ]
    if found:
        raise ConfigError(
            f"{folder} holds integers in {listed(found)}, and its config.json has no quantization_config that says"
            " what they stand for: name the model that was quantized"
        )


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


def listed(names: list[str]) -> str:
    """Some names, the first few in full."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _safetensors(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118 - no mapping


def _pickled(file: Path) -> dict[str, str]:
    content = torch.load(file, map_location="meta", weights_only=True)
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: "F" if value.is_floating_point() else "I" for name, value in tensors.items()}


def _on_meta(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if tensor.is_meta]
