"""Loads models from disk: tensors that transformers would silently fill in or ignore are refused by name.

It fills parameters that no file has with random numbers and passes over tensors that it has no place for; it
says so in a log that is silenced here.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qat import faults, model_files
from qat.errors import ConfigError, reason

# transformers sets the default type of the whole process while it makes or loads a model, and draws from the global
# generator: of two at once the later one to end would leave the earlier one's type there for good. Nothing else may
# rely on either, whoever loads.
LOADING = RLock()

SAFE = {"local_files_only": True, "trust_remote_code": False}
NAMED = 3  # tensors named in a message
PROBE = 16  # tokens in each row that tests for causality

# Errors that transformers and its dependencies raise for a folder that they cannot read.
CONFUSED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
    *(ArithmeticError, AssertionError, EOFError, SafetensorError, UnpicklingError, StrictDataclassError),
)


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turns what goes wrong inside over someone's files into one sentence.

    Raises:
        ConfigError: `what`, with the reason.
    """
    try:
        yield
    except CONFUSED as error:
        if faults.explain(error):  # the machine is at fault, not a file
            raise
        raise ConfigError(f"{what} ({reason(error)})") from None


def settings(folder: Path) -> PreTrainedConfig:
    """Its `config.json`.

    Raises:
        ConfigError: transformers does not know the architecture, or cannot use the values.
    """
    kind = model_files.settings(folder).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{folder} holds a model of type {kind}, which transformers {transformers.__version__} does not know:"
            " a newer one may"
        )
    with understood(f"{folder / model_files.CONFIG} does not describe a model that transformers can compute"):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder, **SAFE))


def skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model of a configuration, without memory behind it: names, shapes and types.

    Raises:
        ConfigError: its values make no model.
    """
    with LOADING, understood(f"{folder / model_files.CONFIG} makes no model"), torch.device("meta"):
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
        ConfigError: a tensor is missing, has no place or is misshapen, or a file is damaged.
    """
    with LOADING, understood(f"{folder} {failing}"), _naming_unconverted(folder):
        model, report = auto.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE | how
        )
    refuse_incomplete(folder, model, report)
    return cast(PreTrainedModel, model)


def refuse_incomplete(folder: Path, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuses a model whose tensors differ from those in its files.

    Raises:
        ConfigError: by the names of the tensors.
    """
    on_meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    misshapen = [f"{name} ({list(there)}, not {list(wanted)})" for name, there, wanted in report["mismatched_keys"]]
    found = {
        "lacks": sorted({*report["missing_keys"], *on_meta}),
        "has tensors of another shape than its config.json says,": sorted(misshapen),
        "has tensors that the model of its config.json has no place for,": sorted(report["unexpected_keys"]),
    }
    for what, names in found.items():
        if names:
            raise ConfigError(f"{folder} {what} {listed(names)}: it is not all of one model, so save or copy it again")


def refuse_not_finite(folder: Path, model: nn.Module, prefix: str = "") -> None:
    """Refuses NaN and infinity in parameters and buffers that are in memory, in one pass over them.

    Args:
        folder: of the model.
        model: it, or a part of it.
        prefix: of the part's names.

    Raises:
        ConfigError: by the names of the tensors.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    numbers = {
        prefix + name: tensor
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta
    }
    if not numbers:
        return
    ends = torch.stack([torch.stack(tensor.detach().aminmax()).float() for tensor in numbers.values()])
    finite = ends.isfinite().all(1).tolist()
    if not all(finite):
        names = [name for name, fine in zip(numbers, finite, strict=True) if not fine]
        half = next(model.parameters()).dtype is torch.float16
        how = " in float16: try instance.precision=bf16 or fp32" if half else ": the folder is damaged"
        raise ConfigError(f"{folder} has numbers that are NaN or infinite in {listed(names)}{how}")


@torch.inference_mode()
def refuse_foresight(folder: Path, model: PreTrainedModel) -> torch.Tensor:
    """Refuses a model whose logits depend on tokens that come later: it cannot predict them.

    Returns:
        The token ids [2, T] that it was computed on, on its device.

    Raises:
        ConfigError: it does, or it cannot be computed on a row of tokens.
    """
    vocabulary, half = int(model.config.get_text_config().vocab_size), PROBE // 2
    ids = torch.randint(vocabulary, (2, PROBE), generator=torch.Generator().manual_seed(0))
    ids[1, :half] = ids[0, :half]  # two rows with the same first half
    ids = ids.to(model.device)
    with understood(f"{folder} cannot be computed"):
        first, second = cast(Any, model)(ids).logits[:, :half].float()
    if not bool((first - second).norm() <= 0.05 * first.norm()):
        raise ConfigError(f"{folder} holds a model that sees what comes later, so it does not predict the next token")
    return ids


def listed(names: list[str]) -> str:
    """Some names, the first few in full."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _naming_unconverted(folder: Path) -> Iterator[None]:
    """Names the tensors that could not be put together: transformers does so in its log alone."""
    said: list[str] = []
    log, handler = logging.getLogger("transformers.modeling_utils"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, log.level, log.propagate = log.level, logging.WARNING, False
    log.addHandler(handler)
    try:
        yield
    except RuntimeError:
        if names := re.findall(r"^(\S+)\s*\|\s*CONVERSION", "\n".join(said), re.MULTILINE):
            raise ConfigError(
                f"{folder} lacks some of what {listed(sorted(names))} is made from, or has it in other shapes:"
                f" {model_files.REMEDY}"
            ) from None
        raise
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = level, True
