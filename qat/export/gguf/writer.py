"""Writes a GGUF file with the writer of the package `gguf`, and reads it back with its reader and decoders."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast as cast_to

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.config import ExportConfig, ExportType
from qat.console import console
from qat.errors import ArtifactError, ConfigError
from qat.export.gguf import FILE, blocks, tables, vocabulary
from qat.export.gguf.families import FAMILIES, Family, factors, fields, head_size, window
from qat.export.gguf.types import type_of
from qat.export.source import CPU, DTYPES, Source, cast
from qat.quant import experts
from qat.quant.linear import Quantized, quantized

DENSE = {  # by the type of weights
    ExportType.fp32: (GGMLQuantizationType.F32, "ALL_F32"),
    ExportType.fp16: (GGMLQuantizationType.F16, "MOSTLY_F16"),
    ExportType.bf16: (GGMLQuantizationType.BF16, "MOSTLY_BF16"),
}
ROTATED = ("q_proj", "k_proj")  # layers whose outputs are rotated
CHOOSES = "ffn_gate_inp.weight"  # how the names of tensors end that choose experts, which llama.cpp has in fp32
Rows = Tensor | slice


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes the file.

    Raises:
        ConfigError: llama.cpp has no name for how the tokenizer splits text, or for a parameter.
        NumericsError: a dense number does not fit into `export.dtype`.
    """
    described = source.teacher.settings().to_dict()
    family = FAMILIES[described["model_type"]]
    writer = GGUFWriter(folder / FILE, family.name)
    vocabulary.add(writer, source.teacher)
    writer.add_name(vocabulary.file_name(source.teacher))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(tables.file_type(_file_type(source, settings)))
    for name, value in fields(described).items():
        _add(writer, f"{family.name}.{name}", value)
    if dense := sum(len(modules) for modules in _held(source.model).values() if _kind(modules) is None):
        console.print(f"{dense} layers are in no type of llama.cpp and are written in {settings.dtype.name}")
    if seen := window(described):
        console.print(f"llama.cpp sees all tokens where this model sees {seen}: the file says that it is for so many")
    for name, divisors in factors(described).items():
        writer.add_tensor(name, np.array(divisors, dtype=np.float32))
    for name, value, kind in _tensors(source, family, settings):
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, name: str, value: str | float | int) -> None:
    """A field in the type that llama.cpp looks for."""
    if isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_uint32(name, value)


def _file_type(source: Source, settings: ExportConfig) -> str:
    """By the type that most weights are in, which llama.cpp shows."""
    counts: dict[str, int] = {}
    for module in quantized(source.model).values():
        kind = type_of(module.format.settings()) or ""
        counts[kind] = counts.get(kind, 0) + module.indices.numel()
    most = max(counts, key=lambda kind: counts[kind]) if counts else ""
    shown = {"": DENSE[settings.dtype][1], "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
    return shown.get(most, f"MOSTLY_{most}")


def _held(model: PreTrainedModel) -> dict[str, list[Quantized]]:
    """Quantized matrices by the parameter that a plain model has in their place: one, or those of all experts."""
    found: dict[str, list[Quantized]] = {}
    for name, module in quantized(model).items():
        owner, _, parameter = experts.parsed(name) if experts.home(model, name) else (name, -1, "weight")
        found.setdefault(f"{owner}.{parameter}", []).append(module)
    return found


def _kind(modules: list[Quantized]) -> str | None:
    """The type that holds some matrices, of which llama.cpp has one for all experts; None: none does."""
    kinds = {type_of(module.format.settings()) for module in modules}
    return kinds.pop() if len(kinds) == 1 else None


@torch.no_grad()
def _tensors(
    source: Source, family: Family, settings: ExportConfig
) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
    """Every tensor with llama.cpp's name and type, rows in its order."""
    layers, names = quantized(source.model), Names(source.model, family)
    for name, modules in _held(source.model).items():
        kind = _kind(modules)
        for stored, rows in names.places(name, modules[0].outputs):
            if kind is not None:
                made = [_packed(module, rows) for module in modules]
                yield stored, np.stack(made) if _is_stack(name) else made[0], tables.kind(kind)
            else:
                weight = _whole(name, [module.weight(torch.float32)[rows] for module in modules])
                yield stored, *_dense(name, weight, settings.dtype)
    for name, parameter in source.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if (owner not in layers or leaf == "bias") and parameter.numel():
            value = parameter + names.added(name) if names.added(name) else parameter
            for stored, rows in names.places(name, value.shape[_rows_of(value)]):
                dtype = ExportType.fp32 if stored.endswith(CHOOSES) else settings.dtype
                yield stored, *_dense(name, value[_index(value, rows)], dtype)


def _packed(module: Quantized, rows: Rows) -> blocks.Bytes:
    parts = {part: value[rows] for part, value in module.normalized().items()}
    return blocks.packed(module.format, module.indices[rows], parts)


def _is_stack(name: str) -> bool:
    """Whether a parameter stacks the matrices of experts, [E, O, I]."""
    return name.rpartition(".")[2] not in ("weight", "bias")


def _whole(name: str, matrices: list[Tensor]) -> Tensor:
    """A parameter by its matrices."""
    return torch.stack(matrices) if _is_stack(name) else matrices[0]


def _rows_of(value: Tensor) -> int:
    """Which dimension of a vector, a matrix or a stack counts rows."""
    return 1 if value.dim() == 3 else 0


def _index(value: Tensor, rows: Rows) -> Rows | tuple[slice, Rows]:
    """Some rows of a vector or a matrix, or of every matrix of a stack."""
    return (slice(None), rows) if value.dim() == 3 else rows


def _dense(name: str, value: Tensor, dtype: ExportType) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Matrices in a type; vectors in fp32, as llama.cpp takes no other."""
    if value.dim() == 1:
        return value.float().numpy(), GGMLQuantizationType.F32
    kind, made = DENSE[dtype][0], cast(name, value, DTYPES[dtype]).contiguous()
    if kind is GGMLQuantizationType.BF16:
        return made.view(torch.uint8).numpy(), kind
    return made.numpy(), kind


class Names:
    """What llama.cpp calls a model's parameters, and the order in which it has their rows."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        """Looks the architecture up."""
        settings = model.config.get_text_config().to_dict()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
        self._map = gguf.get_tensor_name_map(arch, settings["num_hidden_layers"])
        self._model, self._family, self._head = model, family, head_size(settings)

    def of(self, name: str) -> str:
        """llama.cpp's name.

        Raises:
            ConfigError: it has none.
        """
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"llama.cpp has no {name} in models of type {self._family.name}: export=hf is dense")
        return str(found)

    def places(self, name: str, rows: int) -> list[tuple[str, Rows]]:
        """Where llama.cpp has a parameter of so many rows: names of tensors, and which rows are in each, in order.

        Raises:
            ConfigError: it has no name for it.
        """
        owner, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":  # of experts, one after the other
            halves = slice(rows // 2), slice(rows // 2, rows)
            return [
                (self.of(f"{owner}.{half}.weight"), places)
                for half, places in zip(("gate_proj", "up_proj"), halves, strict=True)
            ]
        return [(self.of(f"{name}.weight" if _is_stack(name) else name), self.order(owner))]

    def added(self, name: str) -> float:
        """What a file's number is more than the parameter."""
        return 1.0 if self._family.norms_from_one and name.endswith("norm.weight") else 0.0

    def order(self, owner: str) -> Rows:
        """Of a layer's rows: pairs that are turned together lie half a head apart, or side by side."""
        if not self._family.interleaved or owner.rpartition(".")[2] not in ROTATED:
            return slice(None)
        module = self._model.get_submodule(owner)
        rows = module.outputs if isinstance(module, Quantized) else cast_to(nn.Linear, module).out_features
        return torch.arange(rows).view(-1, 2, self._head // 2).mT.flatten()


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a dense weight is rounded to; quantized ones are as they are."""
    return DTYPES[settings.dtype]


@torch.no_grad()
def read(source: Source, folder: Path) -> PreTrainedModel:
    """The model with what the file's tensors decode to, in fp32.

    Raises:
        ArtifactError: a quantized weight decodes to another than the student has.
    """
    model = source.teacher.load(torch.float32, CPU)
    names = Names(source.model, FAMILIES[source.teacher.settings().to_dict()["model_type"]])
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / FILE).tensors}
    held = _held(source.model)
    for name, parameter in model.named_parameters():
        for where, rows in names.places(name, parameter.shape[_rows_of(parameter)]):
            tensor, index = stored[where], _index(parameter, rows)
            value = torch.from_numpy(tables.decoded(tensor.data, tensor.tensor_type).copy()).view_as(parameter[index])
            parameter[index] = value - names.added(name) if names.added(name) else value
        modules = held.get(name, [])
        known = [module.weight(torch.float32) for module in modules] if _kind(modules) is not None else []
        if known and not torch.equal(parameter, _whole(name, known)):
            raise ArtifactError(f"{name} decodes to other weights than the student has: nothing was published")
    return model
