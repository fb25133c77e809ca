"""Opens files of tensors. Nothing in them is trusted before names, types and shapes are checked.

safetensors' own reader looks at a file's header: its length, that tensors neither overlap nor leave gaps, and that
the file ends with them. Pickles (`.pt`) are opened for plain tensors alone.
"""

import json
import math
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from struct import error as Unstructured
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat import system
from qat.errors import ArtifactError, reason
from qat.finite import finite

Known = tuple[str, tuple[int, ...]]  # type and shape of a tensor
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}
FLOATS = ("F32", "F16", "BF16", "F64")
# Bytes per number of each type, in the order in which safetensors writes tensors: widest first, then by name.
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
ALIGNED = 8  # a file's header is padded to a multiple of so many bytes

# Errors that torch raises for a file that is not a state dict's pickle, or is cut short.
UNREADABLE = (
    *(OSError, EOFError, UnpicklingError, zipfile.BadZipFile, Unstructured),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError),
)


@dataclass(frozen=True)
class Wanted:
    """Types, as safetensors writes them (`F32`, `U8`), and shape of a tensor."""

    kinds: tuple[str, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """The form used in messages."""
        return f"{' or '.join(self.kinds)} {list(self.shape)}"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: type as safetensors writes it, shape, and the byte at which it begins."""

    kind: str
    shape: tuple[int, ...]
    offset: int


def read(
    path: Path,
    wanted: Mapping[str, Wanted] | None,
    remedy: str,
    some: bool = False,
    names: Callable[[Collection[str]], dict[str, str]] = lambda stored: dict(zip(stored, stored, strict=True)),
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, finite where they are of floating-point numbers.

    Args:
        path: the file.
        wanted: what it may hold, and holds all of unless `some` will do; None where whoever takes it compares.
        remedy: what to do about a file that is wrong.
        some: any of what is wanted may be missing.
        names: what the tensors of a file are called now, where that may be something else than in it (`qat.older`).

    Raises:
        ArtifactError: it is damaged, or holds something else.
    """
    found = _opened(path, remedy, lambda file: _stored(file))
    called = names(found)
    if wanted is not None and (wrong := difference({called[name]: one for name, one in found.items()}, wanted, some)):
        raise ArtifactError(f"{path} {wrong}: {remedy}")
    tensors = _opened(path, remedy, lambda file: {called[name]: file.get_tensor(name) for name in found})
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise ArtifactError(f"{path} has NaN or infinity in {name}: {remedy}")
    return tensors


def entries(path: Path, remedy: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where the tensors of a safetensors file lie, and the metadata of its header.

    Raises:
        ArtifactError: it is damaged, cut short or goes on behind its end.
    """
    stored, said = _opened(path, remedy, lambda file: (_stored(file), dict(file.metadata() or {})))
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))  # safetensors has checked this header already
    begins = {name: 8 + size + header[name]["data_offsets"][0] for name in stored}
    return {name: Entry(kind, shape, begins[name]) for name, (kind, shape) in stored.items()}, said


class Writer:
    """A safetensors file whose tensors come one at a time, in any order, and can be had back.

    Once all are there its bytes are those that `safetensors.torch.save_file` writes of them.

    Attributes:
        begun: the file was there already, with room for these tensors, and is gone on with.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Known], go_on: bool = False) -> None:
        """Writes the header and makes room for tensors of these types and shapes; with `go_on` into what is there."""
        self._path, self._tensors = path, tensors
        header, self._begins, size = _layout(tensors, None)
        self.begun = go_on and _begins_with(path, header, size)
        if not self.begun:
            with open(path, "wb") as file:
                file.write(header)
                file.truncate(size)

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor to its place.

        Raises:
            ValueError: it has another type or shape than was said.
        """
        if known(tensor) != self._tensors[name]:
            raise ValueError(f"{name} is {known(tensor)} and not {self._tensors[name]}")
        with open(self._path, "r+b") as file:
            file.seek(self._begins[name])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def get(self, name: str) -> Tensor:
        """A tensor that was written."""
        with safe_open(self._path, framework="pt") as file:
            return cast(Tensor, file.get_tensor(name))

    def flush(self) -> None:
        """Has all that was put on disk."""
        system.flush(self._path)


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    """Whether a file is there that has this header and so many bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(len(header)) == header and file.seek(0, 2) == size
    except OSError:
        return False


def file_bytes(tensors: Mapping[str, Known], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `safetensors.torch.save_file` writes of tensors of these types and shapes."""
    return _layout(tensors, metadata)[2]


def _layout(tensors: Mapping[str, Known], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file as its own writer makes it, where each tensor begins, and the file's bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    order, end, begins = list(WIDTHS), 0, dict[str, int]()
    for name, (kind, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        begin, end = end, end + WIDTHS[kind] * math.prod(shape)
        header[name], begins[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}, begin
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % ALIGNED)
    ahead = 8 + len(written)
    places = {name: ahead + begin for name, begin in begins.items()}
    return len(written).to_bytes(8, "little") + written, places, ahead + end


def difference(found: Mapping[str, Known], wanted: Mapping[str, Wanted], some: bool = False) -> str:
    """How types and shapes by name differ from the wanted ones, in a few words; nothing where they do not."""
    if strange := sorted(found.keys() - wanted.keys()):
        return f"holds {ascii(strange[0])[1:-1]}, which does not belong there"
    missing = [] if some else sorted(wanted.keys() - found.keys())
    if missing:
        return f"lacks {missing[0]}"
    for name, (kind, shape) in found.items():
        if kind not in wanted[name].kinds or shape != wanted[name].shape:
            return f"holds {name} as {kind} {list(shape)} instead of {wanted[name]}"
    return ""


def known(tensor: Tensor) -> Known:
    """Type and shape of a tensor as a file would have them."""
    return KINDS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)


def unpickled(path: Path, where: str | None = None, mapped: bool = False) -> Any:
    """What lies in a file of `torch.save`, which may hold nothing but tensors in plain containers.

    Args:
        path: the file.
        where: the device, if it is to be another than that of the file.
        mapped: numbers stay in the file until they are used, where its format lets them.

    Raises:
        ValueError: it holds more, is damaged or cut short; the text says which.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns about some pickles before it refuses them
            return torch.load(path, map_location=where, weights_only=True, mmap=mapped and zipped)
    except UnpicklingError:
        raise ValueError("it is damaged or holds more than plain tensors, which could run code") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UNREADABLE as error:
        raise ValueError(reason(error)) from None


def _refuse_compressed(path: Path) -> None:
    """Refuses parts that torch would unpack without end, or take for numbers as they lie there."""
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise ValueError(f"its part {ascii(part.filename)[1:-1]} is compressed, which torch.save never does")


def is_plain(value: Any) -> bool:
    """Whether a value of a pickle is an ordinary tensor: strided, in memory, of real numbers."""
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    return plain and not value.is_complex() and not value.is_nested


def _stored(file: Any) -> dict[str, Known]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - file is not a mapping
    return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def _opened(path: Path, remedy: str, use: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return use(file)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: {remedy}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged or no file of safetensors ({reason(error)}): {remedy}") from None
