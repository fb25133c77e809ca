"""Students of the ANEMLL training scripts: a V2 state dict, with or without the `config.json` beside it.

Codebook sizes, ranks and flags are read off the tensors; `config.json` only decides how raw scales become
the ones that are used. What such a file may also hold and this project does not compute (LoRA, codebooks of
the scales themselves) is named once. docs/FORMATS.md describes the layout.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import manifests, tensor_files
from qat.artifacts import read_json
from qat.checkpoints.native import describe
from qat.checkpoints.own import adopt
from qat.config import QuantConfig, WeightConfig
from qat.errors import ArtifactError
from qat.machine import Machine
from qat.models import ModelFolder
from qat.quant.architectures import Layer
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear
from qat.quant.lookup import look_up, nearest, relative
from qat.quant.places import bias

log = logging.getLogger(__name__)

SCALES = ("scale_A", "scale_B", "rank_magnitude")
PARTS = (*SCALES, "lut", "weight", "_Q", "_indices", "_scales_baked_flag")
NORM_EPS = 1e-6  # norms are raised to at least this value before dividing by them
MAGNITUDE_EPS = 1e-6  # constant added to magnitudes after their activation
# Largest difference allowed between a stored `_Q` and its codebook entry, relative to the largest entry
OFF_CODEBOOK = 1e-2
# Roles and their layers in this layout.
LEAVES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
ROLE_OF = {leaf: role for role, leaves in LEAVES.items() for leaf in leaves}
# Settings of `config.json` that are copied to the manifest
ORIGIN = ("model_id", "config_preset", "final_loss", "source_checkpoint")

State = dict[str, Tensor]

# Dimensions of each part, in letters, and whether it holds floating-point numbers: O outputs, I inputs, R the rank,
# K codebook entries, 1 for a scalar.
SHAPES = {
    "scale_A": ("OR", True),
    "scale_B": ("RI", True),
    "rank_magnitude": ("R", True),
    "lut": ("K", True),
    "weight": ("OI", True),
    "_Q": ("OI", True),
    "_indices": ("OI", False),
    "_scales_baked_flag": ("1", False),
}
ENTRIES = range(2, 257)  # allowed numbers of entries in a codebook


def load(file: Path, teacher: ModelFolder, machine: Machine) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student of a V2 state dict, and a manifest like that of our own checkpoints.

    Raises:
        ArtifactError: the file cannot be read, lacks a tensor, contradicts itself or fits another model.
    """
    state, settings = read(file), read_settings(file)
    names = _layer_names(file, state, teacher.skeleton(), settings)
    model = teacher.load(torch.float32, torch.device("cpu"))
    own, unused = _own_parameters(file, state, model, names)
    if unused:
        log.warning("%s: not used are %s", file, _listed(unused))
    if (machine.dtype, machine.device.type) != (torch.float32, "cpu"):
        model = teacher.load(machine.dtype, machine.device)
    layers = []
    for name in names:
        module = _module(f"{file}: {name}", _parts(state, name), settings, bias(model, name))
        model.set_submodule(name, module.to(machine.device).requires_grad_(False))
        layers.append(_layer(name, module))
    adopt(model, own)
    origin = {key: settings[key] for key in ORIGIN if key in settings}
    return model, describe(teacher, _preset(layers), layers) | {"source": {"file": str(file)} | origin}


def latent(file: Path) -> State:
    """The latent weights of the quantized layers, fp32, by layer."""
    state = read(file)
    keys = [f"{name.removesuffix('.lut')}.weight" for name in state if name.endswith(".lut")]
    return {key.removesuffix(".weight"): state[key].float() for key in keys if key in state}


def read(file: Path) -> State:
    """The tensors by name; whatever is not needed stays on disk.

    Raises:
        ArtifactError: no state dict, or one with more than tensors in it.
    """
    try:
        content = tensor_files.unpickled(file, "cpu", mapped=True)
    except ValueError as error:
        raise ArtifactError(f"{file} cannot be read as a state dict of plain tensors ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        content = content["model_state_dict"]
    if not isinstance(content, dict) or not any(str(key).endswith(".lut") for key in content):
        raise ArtifactError(f"{file} is no V2 checkpoint: it has no codebooks (keys that end in .lut)")
    return {str(key): value for key, value in content.items() if tensor_files.is_plain(value)}


def read_settings(file: Path) -> dict[str, Any]:
    """The `config.json` beside a state dict; empty where there is none.

    Raises:
        ArtifactError: it is not JSON, or of another version.
    """
    path = file.parent / "config.json"
    settings = read_json(path)
    try:
        manifests.V2_SETTINGS(settings, "")
    except manifests.Wrong as wrong:
        raise ArtifactError(f"{path} describes no V2 checkpoint ({wrong}): mend or remove it") from None
    if settings.get("version", "v2") != "v2":
        raise ArtifactError(f"{path} is of version {settings['version']}: only v2 checkpoints can be read")
    return settings


def _layer_names(file: Path, state: State, model: nn.Module, settings: dict[str, Any]) -> list[str]:
    """The quantized layers in the model's order, each of the model's own shape."""
    stored = {key.removesuffix(".lut") for key in state if key.endswith(".lut")}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    origin = f" (it was made from {settings['model_id']})" if settings.get("model_id") else ""
    foreign = f"{file} does not belong to this model{origin}"
    for name in sorted(stored):
        if _leaf(name) not in ROLE_OF:
            raise ArtifactError(f"{file} has a codebook for {name}: only {', '.join(ROLE_OF)} layers can have one")
    leaves = {_leaf(name) for name in stored}
    for name, module in linears.items():
        if name in stored:
            _check_shape(foreign, name, _shape(file, name, state), tuple(module.weight.shape))
        elif _leaf(name) in leaves and f"{name}.weight" not in state:
            raise ArtifactError(f"{foreign}: it has nothing for {name}")
    if missing := sorted(stored - linears.keys()):
        raise ArtifactError(f"{foreign}: the model has no linear layer {missing[0]}")
    return [name for name in linears if name in stored]


def _shape(file: Path, name: str, state: State) -> tuple[int, ...]:
    """Outputs and inputs of a layer; checks the shape and type of each of its parts."""
    parts = _parts(state, name)
    for part in SCALES:
        if part not in parts:
            raise ArtifactError(f"{file} has a codebook for {name} but no {name}.{part}")
    sizes: dict[str, int] = {"1": 1}
    for part, (letters, floating) in SHAPES.items():
        if part in parts:
            _check_part(f"{file}: {name} has", part, parts[part], letters, floating, sizes)
    if sizes["R"] > min(sizes["O"], sizes["I"]):
        raise ArtifactError(
            f"{file}: {name} has scales of rank {sizes['R']}, and its weight is {sizes['O']}×{sizes['I']}: no rank"
            " above the smaller side can be meant"
        )
    if sizes["K"] not in ENTRIES:
        raise ArtifactError(f"{file}: {name} has a codebook of {sizes['K']} entries: from 2 to 256 can be read")
    return sizes["O"], sizes["I"]


def _check_part(has: str, part: str, value: Tensor, letters: str, floating: bool, sizes: dict[str, int]) -> None:
    """Checks the shape of one part; `sizes` has the dimensions known from earlier parts and gets this part's."""
    if part in ("lut", "_scales_baked_flag"):  # some files store these with extra dimensions of size one
        value = value.flatten()
    wanted = tuple(sizes.get(letter, size) for letter, size in zip(letters, value.shape, strict=False))
    if value.dim() != len(letters) or tuple(value.shape) != wanted or not value.numel():
        known = "×".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ArtifactError(f"{has} a {part} of {_times(tuple(value.shape)) or 'no dimensions'} where {known} belongs")
    if value.is_floating_point() != floating or value.dtype is torch.bool:
        kind, wanted_kind = str(value.dtype).removeprefix("torch."), "floating-point" if floating else "whole"
        raise ArtifactError(f"{has} a {part} of {kind}, and {wanted_kind} numbers belong there")
    if floating and not bool(value.isfinite().all()):
        raise ArtifactError(f"{has} NaN or infinity in its {part}")
    sizes.update(zip(letters, value.shape, strict=True))


def _check_shape(foreign: str, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if stored != expected:
        raise ArtifactError(f"{foreign}: {name} is {_times(stored)} in the checkpoint and {_times(expected)} here")


def _own_parameters(file: Path, state: State, model: nn.Module, quantized: list[str]) -> tuple[State, list[str]]:
    """Parameters that differ from the teacher's, and the keys that are not used here."""
    quantized_parts = {f"{name}.{part}" for name in quantized for part in PARTS}
    theirs = dict(model.named_parameters(remove_duplicate=False))
    own: State = {}
    homes: dict[int, str] = {}  # by id: a tied parameter is listed once, however many names it has
    for name, parameter in theirs.items():
        if name in quantized_parts or name not in state:
            continue
        value = state[name]
        _check_shape(f"{file} does not belong to this model", name, tuple(value.shape), tuple(parameter.shape))
        if not (value.is_floating_point() and bool(value.isfinite().all())):
            raise ArtifactError(f"{file} has something else than finite floating-point numbers in {name}")
        home = homes.setdefault(id(parameter), name)
        if home != name and not torch.equal(value, state[home]):
            raise ArtifactError(f"{file}: {name} differs from {home}, and this model ties the two")
        if home == name and not torch.equal(value.to(parameter.dtype), parameter):
            own[name] = value.clone()
    buffers = {name for name, _ in model.named_buffers()}
    return own, [key for key in state if not any(key in known for known in (quantized_parts, theirs, buffers))]


def _parts(state: State, name: str) -> State:
    return {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}


def _module(where: str, parts: State, settings: dict[str, Any], bias: Tensor | None) -> QuantLinear:
    """One quantized layer that computes the same function as the code the file comes from."""
    A, B, g = _scales(parts, settings)
    codebook = parts["lut"].float().flatten()
    bits = (len(codebook) - 1).bit_length()
    module = QuantLinear(Codebook(bits, len(g)), A.shape[0], B.shape[1], bias)
    module.indices.copy_(_indices(where, parts, codebook, (A * g) @ B))
    full = torch.cat([codebook, codebook[-1:].expand(2**bits - len(codebook))])
    module.set_parts({"codebook": full, "scale_A": A, "scale_B": B, "rank_magnitude": g})
    return module


def _scales(parts: State, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """A [O, R], B [R, I] and g [R] as used: unchanged if baked, else made positive if asked, and normalized."""
    A, B, g = (parts[name].float() for name in SCALES)
    if int(parts.get("_scales_baked_flag", torch.zeros(1, dtype=torch.int8)).flatten()[0]):
        return A, B, g
    if settings.get("force_positive_scales"):
        method = settings.get("positive_scale_method", "abs")
        A, B = _activated(A, method), _activated(B, method)
    activation = settings.get("magnitude_activation", "identity")
    if activation != "identity":
        g = _activated(g, activation) + MAGNITUDE_EPS
    A = A / A.norm(dim=0, keepdim=True).clamp_min(NORM_EPS)
    return A, B / B.norm(dim=1, keepdim=True).clamp_min(NORM_EPS), g


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "abs":
        return x.abs()
    if activation == "softplus":
        return nn.functional.softplus(x)
    raise ArtifactError(f"config.json asks for the activation {activation} of scales: known are abs and softplus")


def _indices(where: str, parts: State, codebook: Tensor, S_OI: Tensor) -> Tensor:
    """Indices [O, I] uint8: the stored ones, else those of the stored `_Q`, else nearest to latent weight / scale."""
    if "_indices" in parts:
        index = _stored(where, parts["_indices"].long(), len(codebook))
    elif "_Q" in parts:
        index = _nearest(parts["_Q"].float(), codebook)
    elif "weight" in parts:
        index = _nearest(relative(parts["weight"].float(), S_OI), codebook)
    else:
        raise ArtifactError(f"{where} has neither _indices nor _Q nor weight: its values cannot be known")
    if "_Q" in parts:
        apart = float((parts["_Q"].float() - look_up(codebook, index)).abs().max())
        if apart > OFF_CODEBOOK * float(codebook.abs().max()):
            raise ArtifactError(f"{where} has a _Q that is up to {apart:.3g} away from its codebook's entries")
    return index


def _stored(where: str, index: Tensor, entries: int) -> Tensor:
    if index.min() < 0 or index.max() >= entries:
        raise ArtifactError(f"{where} has indices from {index.min()} to {index.max()} and {entries} codebook entries")
    return index.to(torch.uint8)


def _nearest(x_OI: Tensor, codebook: Tensor) -> Tensor:
    """Index, uint8, of the entry nearest to each value, for a codebook in any order."""
    ascending, order = codebook.sort()
    return order.to(torch.uint8)[nearest(x_OI, ascending).long()]


def _layer(name: str, module: QuantLinear) -> Layer:
    return Layer(name, ROLE_OF[_leaf(name)], (module.outputs, module.inputs), module.format)


def _preset(layers: list[Layer]) -> QuantConfig:
    """The bits and rank of most layers of each role; other values are in the manifest's entries for layers."""
    chosen: dict[str, WeightConfig | None] = {role: None for role in LEAVES}
    for role in LEAVES:
        if counted := Counter(layer.format for layer in layers if layer.role == role):
            chosen[role] = WeightConfig(**counted.most_common(1)[0][0].settings())
    bits_of = {role: weights.bits if weights else 16 for role, weights in chosen.items()}
    return QuantConfig(f"q{bits_of['mlp']}a{bits_of['attn']}", mlp=chosen["mlp"], attn=chosen["attn"])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _listed(keys: list[str]) -> str:
    """The last parts of the keys, each with its count: `lora_A (196), lora_B (196)`."""
    return ", ".join(f"{leaf} ({count})" for leaf, count in Counter(map(_leaf, keys)).items())
