"""The size of a student: bits per weight and bytes of its packed file, computed from formats and shapes alone.

The two sides of a packed file, who writes and who reads it, have the same tensors; this module names them once more
without their numbers, so that a size is known before anything is fitted.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qat import tensor_files
from qat.config import ROLES
from qat.quant import packing, vocabulary
from qat.quant.architectures import EXACT_BITS, Layer, dense
from qat.quant.experts import parsed
from qat.quant.formats import GroupGrid
from qat.tensor_files import KINDS as TYPES
from qat.tensor_files import Known

DENSE_BITS = 16  # bits of a weight that is neither quantized nor rounded
GROUP = 64  # columns of a rounded matrix that share a scale
METADATA = {"format": "pt"}  # metadata of a packed file


def bits_per_weight(layers: list[Layer]) -> float:
    """Mean bits per weight over all quantized weights."""
    return sum(layer.weights * layer.bits_per_weight for layer in layers) / sum(layer.weights for layer in layers)


def rounded(layers: Iterable[Layer], model: nn.Module) -> list[Layer]:
    """What a packed file has in 8 bits although the student has it exact: embedding and head.

    It costs less KL than can be measured (docs/log/size.md) and saves half of their bytes. Columns share a scale in
    groups of `GROUP`, or all of them where these do not divide a row.
    """
    quantized, found = {layer.name for layer in layers}, []
    for name, role in vocabulary.possible(model).items():
        if name not in quantized:
            tokens, hidden = model.get_parameter(f"{name}.weight").shape
            group = hidden if hidden % GROUP else GROUP
            found.append(Layer(name, role, (tokens, hidden), GroupGrid(EXACT_BITS, group, "integers")))
    return found


def model_bits_per_weight(layers: list[Layer], model: nn.Module, exact: bool = False) -> float:
    """Mean bits per weight of the packed file over the whole model, parts that are not in few bits counting 16 bits.

    With `exact`, of a file in which embedding and head are not rounded.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    small = layers if exact else [*layers, *rounded(layers, model)]
    rest = whole - sum(layer.weights for layer in small)
    return (sum(x.weights * x.bits_per_weight for x in small) + DENSE_BITS * rest) / whole


def file_bytes(layers: list[Layer], model: nn.Module, dtype: torch.dtype = torch.bfloat16, exact: bool = False) -> int:
    """Bytes of the file of a packed export (`export=packed`), header included.

    Args:
        layers: that are quantized.
        model: the teacher, or its names and shapes.
        dtype: of everything else.
        exact: embedding and head are not rounded where they are not quantized (`export.dense`).
    """
    small = layers if exact else [*layers, *rounded(layers, model)]
    return tensor_files.file_bytes(stored(small, model, dtype), METADATA)


def stored(layers: Iterable[Layer], model: nn.Module, dtype: torch.dtype) -> dict[str, Known]:
    """The tensors of a packed file with some layers in few bits: type and shape by name, tied ones once."""
    found: dict[str, Known] = {}
    quantized = set()
    for layer in layers:
        owner, _, leaf = parsed(layer.name)
        quantized |= {layer.name, f"{owner}.{leaf}"}  # the second name is that of a stack's parameter
        found[f"{layer.name}.indices"] = "U8", (packing.packed_bytes(layer.weights, layer.format.bits),)
        for name, part in layer.format.parts(*layer.shape).items():
            found[f"{layer.name}.{name}"] = "F16", part.shape
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not {owner, name} & quantized or leaf == "bias":
            found[name] = TYPES[dtype], tuple(parameter.shape)
    return found


def summary(
    layers: list[Layer],
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = False,
    adapters: int = 0,
) -> dict[str, Any]:
    """Sizes, counts and the weights that stay dense, as in `result.json`.

    Bits are said of the quantized layers and of the whole model, bytes of its packed file; arguments as of
    `file_bytes`. `rounded` has the bits of what only that file has in few of them, by name. Numbers in `adapters` are
    in none of these, but, where there are any, in `adapter_bytes`, which lie beside that file.
    """
    roles = {role: [layer for layer in layers if layer.role == role] for role in ROLES}
    figures: dict[str, Any] = {
        "bits_per_weight": round(bits_per_weight(layers), 4),
        "model_bits_per_weight": round(model_bits_per_weight(layers, model, exact), 4),
        "file_bytes": file_bytes(layers, model, dtype, exact),
        "rounded": {} if exact else {one.name: round(one.bits_per_weight, 4) for one in rounded(layers, model)},
        "layers": len(layers),
        **({"adapter_bytes": 4 * adapters} if adapters else {}),
    }
    for role, members in roles.items():
        figures[f"{role}_layers"] = len(members)
        if members:
            figures[f"{role}_bits_per_weight"] = round(bits_per_weight(members), 4)
    return figures | {"dense": {pattern: round(share, 4) for pattern, share in dense(model, layers).items()}}


def said(figures: dict[str, Any]) -> str:
    """The sizes of a whole model in a few words, from what `summary` gives."""
    sizes = f"{figures['file_bytes'] / 1e6:.1f} MB, {figures['model_bits_per_weight']:.2f} bits a weight"
    if names := " and ".join(figures["rounded"]):
        sizes += f", {names} rounded to {EXACT_BITS} bits there"
    beside = figures.get("adapter_bytes", 0)
    return f"{sizes}, and {beside / 1e6:.1f} MB of adapters beside it" if beside else sizes
