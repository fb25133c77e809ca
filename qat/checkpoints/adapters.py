"""Adapters of a student in a checkpoint's folder, in the files that PEFT writes and reads.

So `peft.PeftModel.from_pretrained(model, folder)` puts them on an export of the checkpoint, whatever else the folder
holds. PEFT calls a layer `base_model.model.<layer>` and its matrices `lora_A.weight` [R, I] and `lora_B.weight`
[O, R].
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from qat import tensor_files
from qat.checkpoint_files import ADAPTERS, ADAPTERS_CONFIG, adapters_of
from qat.errors import ArtifactError
from qat.quant import adapter
from qat.quant.adapter import Adapter
from qat.quant.linear import QuantHead, QuantLinear, quantized
from qat.tensor_files import Wanted

FILE, CONFIG = ADAPTERS, ADAPTERS_CONFIG
ABOVE = "base_model.model."  # what PEFT's own modules around the model add to names
MATRICES = {"A": "lora_A.weight", "B": "lora_B.weight"}


def adaptable(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model that can have an adapter: its linear layers, but no expert of a stack."""
    return {
        name: layer
        for name, layer in quantized(model).items()
        if isinstance(layer, QuantLinear) and not isinstance(layer, QuantHead) and layer.stack is None
    }


def write(model: nn.Module, folder: Path) -> None:
    """Writes a model's adapters, fp32; no files where it has none."""
    found = adapter.adapters(model)
    if not found:
        return
    tensors = {key: value.detach().cpu().contiguous() for key, value in _named(found).items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    text = json.dumps(_config(found, model), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _config(found: dict[str, Adapter], model: nn.Module) -> dict[str, Any]:
    """PEFT's `LoraConfig` of these adapters of a model, by layer."""
    one = next(iter(found.values()))
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": one.rank,
        "target_modules": _targets(set(found), {name for name, _ in model.named_modules()}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(names: set[str], modules: set[str]) -> list[str]:
    """The last parts of layers' names where these tell them from all other modules, else their whole names."""
    leaves, others = ({name.rpartition(".")[2] for name in some} for some in (names, modules - names))
    return sorted(names if leaves & others else leaves)


def read(model: nn.Module, folder: Path, remedy: str) -> None:
    """Gives the layers of a model, which are in place, the adapters of a checkpoint's folder.

    Raises:
        ArtifactError: the files are damaged, or belong to other layers.
    """
    rank, alpha = adapters_of(folder, remedy)
    layers = adaptable(model)
    shapes = {name: ((rank, layer.inputs), (layer.outputs, rank)) for name, layer in layers.items()}
    wanted = {
        _key(name, matrix): Wanted(("F32",), shape)
        for name, pair in shapes.items()
        for matrix, shape in zip(MATRICES, pair, strict=True)
    }
    tensors = tensor_files.read(folder / FILE, wanted, remedy, some=True)
    for name, layer in layers.items():
        pair = {matrix: tensors.get(_key(name, matrix)) for matrix in MATRICES}
        if all(value is None for value in pair.values()):
            continue
        made = adapter.put(layer, rank, alpha).requires_grad_(False)
        for matrix, value in pair.items():
            if value is None:
                raise ArtifactError(f"{folder / FILE} lacks {_key(name, matrix)}: {remedy}")
            made.get_parameter(matrix).copy_(value)


def copy_adapters(checkpoint: Path, folder: Path) -> None:
    """Copies the adapters of a checkpoint's folder to a new one, which has nothing else."""
    folder.mkdir()
    for name in (FILE, CONFIG):
        shutil.copyfile(checkpoint / name, folder / name)


def _named(found: dict[str, Adapter]) -> dict[str, Tensor]:
    return {_key(name, matrix): value for name, one in found.items() for matrix, value in one.named_parameters()}


def _key(layer: str, matrix: str) -> str:
    return f"{ABOVE}{layer}.{MATRICES[matrix]}"
