"""llama.cpp's own types: its `llama_model_quantize` under an importance matrix, by the package llama-cpp-python.

llama.cpp chooses the type of every tensor itself, by the name that a user gives it (`Q4_K_M`), and takes another
where the rows of a tensor are no whole number of blocks. It decodes its files itself as well, by writing them in
fp32; tests compare that with the decoders of the package `gguf`.
"""

import ctypes
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from llama_cpp import llama_cpp
from torch import Tensor, nn

from peers.stored import Stored
from qat.cache.batch import Text
from qat.config import ExportConfig, ExportType
from qat.errors import ConfigError, NumericsError
from qat.export.gguf import FILE, writer
from qat.export.gguf.families import FAMILIES
from qat.export.source import CPU, Source
from qat.forward import body
from qat.models import ModelFolder
from qat.quant.places import places
from qat.suggest import did_you_mean

SETTINGS = {"imatrix": "mean squares of the inputs of all layers, none for the embedding"}
FTYPE, TYPE = "LLAMA_FTYPE_MOSTLY_", "GGML_TYPE_"  # how llama.h begins the names of files and of tensors
ROWS = 16  # forwarded at once

Importance = dict[str, np.ndarray]  # mean square of each input of a tensor, fp32, by llama.cpp's name


@torch.no_grad()
def importance(folder: ModelFolder, calibration_NL: Tensor) -> Importance:
    """What `llama-imatrix` gathers from rows of tokens: how large the inputs of each layer are."""
    model = folder.load(torch.float32, CPU)
    names = _names(folder, model)
    layers = {name: place.module for name, place in places(body(model)).items()}
    sums = {name: torch.zeros(place.shape[1], dtype=torch.float64) for name, place in places(body(model)).items()}
    hooks = [module.register_forward_pre_hook(_adding_to(sums[name])) for name, module in layers.items()]
    for batch in Text(calibration_NL).batches(ROWS):
        body(model)(**batch.inputs(), use_cache=False)
    for hook in hooks:
        hook.remove()
    prefix = model.base_model_prefix
    return {
        names.of(f"{prefix}.{name}.weight"): (total / calibration_NL.numel()).float().numpy()
        for name, total in sums.items()
    }


def write(folder: ModelFolder, file: Path) -> None:
    """The model as a GGUF file in fp32, which is what llama.cpp quantizes from."""
    source = Source(folder, folder.load(torch.float32, CPU))
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        writer.write(source, Path(scratch), ExportConfig("gguf", "gguf", ExportType.fp32))
        (Path(scratch) / FILE).rename(file)


def quantize(dense: Path, file: Path, name: str, embedding: str | None, weights: Importance) -> None:
    """Writes a GGUF file in a type of llama.cpp, as `llama-quantize --imatrix` does.

    Args:
        dense: a GGUF file in fp32, fp16 or bf16.
        file: where to write.
        name: what `llama-quantize` calls the type, such as `Q4_K_M` or `IQ4_XS`.
        embedding: the type of the embedding, such as `IQ4_NL`; None leaves it to llama.cpp.
        weights: the importance matrix.

    Raises:
        ConfigError: llama.cpp has no such type.
        NumericsError: llama.cpp refused.
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = _numbered(FTYPE, name)
    if embedding is not None:
        settings.token_embedding_type = _numbered(TYPE, embedding)
    settings.imatrix = _matrix(weights)
    _run(dense, file, settings)


def read(folder: ModelFolder, file: Path) -> Stored:
    """A quantized file, decoded by llama.cpp."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        _run(file, Path(scratch) / FILE, settings)
        model = writer.read(Source(folder, folder.load(torch.float32, CPU)), Path(scratch))
    names, held = _names(folder, model), _tensor_bytes(file)
    return Stored(model, {name: held[names.of(name)] for name, _ in model.named_parameters()}, file.stat().st_size)


class _Opening(ctypes.Structure):
    """`gguf_init_params`: reads what a file says of its tensors, not the tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def _tensor_bytes(file: Path) -> dict[str, int]:
    """Bytes of every tensor by name, by llama.cpp itself, since the package `gguf` does not know its newest types."""
    library = llama_cpp._lib
    functions = {
        "gguf_init_from_file": (ctypes.c_void_p, ctypes.c_char_p, _Opening),
        "gguf_get_n_tensors": (ctypes.c_int64, ctypes.c_void_p),
        "gguf_get_tensor_name": (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64),
        "gguf_get_tensor_size": (ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64),
        "gguf_free": (None, ctypes.c_void_p),
    }
    for name, (gives, *takes) in functions.items():
        getattr(library, name).restype, getattr(library, name).argtypes = gives, takes
    opened = library.gguf_init_from_file(str(file).encode(), _Opening(True, None))
    numbers = range(library.gguf_get_n_tensors(opened))
    found = {library.gguf_get_tensor_name(opened, i).decode(): library.gguf_get_tensor_size(opened, i) for i in numbers}
    library.gguf_free(opened)
    return found


def _names(folder: ModelFolder, model: nn.Module) -> writer.Names:
    return writer.Names(model, FAMILIES[folder.settings().to_dict()["model_type"]])


def _adding_to(sums_I: Tensor):
    """A hook that adds the squares of a layer's inputs."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums_I.add_(inputs[0].square().flatten(0, -2).sum(0))

    return hook


def _numbered(prefix: str, name: str) -> int:
    """llama.h's number for a type.

    Raises:
        ConfigError: it has none of that name.
    """
    known = [other.removeprefix(prefix) for other in vars(llama_cpp) if other.startswith(prefix)]
    if name not in known:
        raise ConfigError(f"llama.cpp has no type {name}{did_you_mean(name, known)}; it knows {', '.join(known)}")
    return getattr(llama_cpp, prefix + name)


def _matrix(weights: Importance) -> ctypes.Array:
    """Entries as llama.h has them, ended by one without a name."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, value) in zip(entries, weights.items(), strict=False):
        entry.name, entry.size = name.encode(), value.size
        entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _run(source: Path, target: Path, settings: llama_cpp.llama_model_quantize_params) -> None:
    """Quantizes, and tells what llama.cpp says only if it fails.

    Raises:
        NumericsError: it did, with its last words.
    """
    said: list[str] = []
    told = llama_cpp.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(told, None)
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)
    logging.getLogger(__name__).debug("".join(said))
    if failed:
        raise NumericsError(f"llama.cpp did not write {target.name}: {' '.join(''.join(said[-3:]).split())}")
