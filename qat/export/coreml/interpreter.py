"""A Core ML program computed with numpy: the only way to check one where Core ML does not run.

It reads the package that was written, not the objects it was written from, and knows the operations that
`program` uses. Products are in fp32; a value beyond fp16 is reported, since Core ML would make it infinite.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from torch import Tensor, nn

from qat.errors import NumericsError
from qat.export.coreml.program import INPUTS, STATES

Array = np.ndarray[Any, Any]
LARGEST = 65504.0  # largest finite fp16 number
# Operations whose results are checked against the range of fp16.
OVERFLOWING = ("add", "mul", "linear", "matmul", "reduce_sum")
MASKED = -1e4  # added to the attention score of an absent token


class Interpreted(nn.Module):
    """A package as a model: token ids [1, T] in, an object with `logits` [1, T, V] out."""

    dtype = torch.float16

    def __init__(self, package: Path) -> None:
        super().__init__()
        spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
        weights = package / "Data" / "com.apple.CoreML" / "weights"
        program = load_program(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
        self.main = program.functions["main"]
        self.constants: dict[str, Any] = {}
        for operation in self.main.operations:
            if operation.op_type.startswith("const"):
                self.constants[operation.outputs[0].name] = _constant(operation)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        """One token after the other, from empty states."""
        states = {name: np.zeros(self.main.inputs[name].shape, np.float32) for name in STATES}
        mask = np.full(self.main.inputs["mask"].shape, MASKED, np.float32)
        rows = []
        for position, token in enumerate(ids[0].tolist()):
            mask[..., position] = 0
            given = dict(zip(INPUTS, (np.array([[token]]), np.array([position]), mask), strict=True))
            rows.append(self._token(given, states))
        return SimpleNamespace(logits=torch.from_numpy(np.concatenate(rows, axis=1)))

    def _token(self, given: dict[str, Array], states: dict[str, Array]) -> Array:
        known: dict[str, Any] = {**self.constants, **given}

        def value(variable: Any) -> Any:
            if isinstance(variable, list | tuple):
                return [value(one) for one in variable]
            if variable.name in states:
                return variable.name
            return known.get(variable.name, variable.val)

        for operation in self.main.operations:
            kind = operation.op_type
            if kind.startswith("const"):
                continue
            inputs = {name: value(variable) for name, variable in operation.inputs.items() if variable is not None}
            if kind == "read_state":
                made: Any = states[inputs["input"]]
            elif kind == "coreml_update_state":
                made = states[inputs["state"]] = inputs["value"]
            else:
                made = OPERATIONS[kind](**inputs)
            for variable, part in zip(operation.outputs, made if isinstance(made, list) else [made], strict=True):
                if kind in OVERFLOWING and part.dtype.kind == "f" and not np.abs(part).max() <= LARGEST:
                    raise NumericsError(f"{variable.name} ({kind}) leaves the range of fp16: export another format")
                known[variable.name] = part
        return np.asarray(known[self.main.outputs[0].name])


def _constant(operation: Any) -> Any:
    if operation.op_type == "constexpr_lut_to_dense":
        indices, lut = (operation.inputs[name].val for name in ("indices", "lut"))
        return lut.reshape(-1).astype(np.float32)[indices.astype(np.int64)]
    value = operation.outputs[0].val
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _linear(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    return np.asarray(x @ weight.T + bias)


def _layer_norm(x: Array, axes: Any, gamma: Array, epsilon: Any, beta: Array | float = 0.0) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + float(epsilon)) * gamma + beta)


def _softmax(x: Array, axis: Any) -> Array:
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return np.asarray(powers / powers.sum(axis=int(axis), keepdims=True))


def _matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    return np.asarray((x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y))


def _slice_update(x: Array, update: Array, begin: Array, end: Array, **_: Any) -> Array:
    """Updates a state in place, as Core ML does; the old state is not read again."""
    x[tuple(slice(int(low), int(high)) for low, high in zip(begin, end, strict=True))] = update
    return x


def _slice(x: Array, begin: Array, end: Array, **_: Any) -> Array:
    stops = [int(high) or None for high in end]
    return x[tuple(slice(int(low), high) for low, high in zip(begin, stops, strict=True))]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "greater_equal": lambda x, y: x >= y,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "cast": lambda x, dtype: x,
    "concat": lambda values, axis, **_: np.concatenate(values, axis=int(axis)),
    "split": lambda x, num_splits, axis, **_: np.split(x, int(num_splits), axis=int(axis)),
    "reshape": lambda x, shape: x.reshape([int(size) for size in shape]),
    "gather": lambda x, indices, axis, **_: np.take(x, indices.astype(np.int64), axis=int(axis)),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axis=tuple(int(axis) for axis in axes), keepdims=bool(keep_dims)),
    "linear": _linear,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "matmul": _matmul,
    "slice_update": _slice_update,
    "slice_by_index": _slice,
}
