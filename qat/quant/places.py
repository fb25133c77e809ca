"""Where a model keeps the matrices that are quantized: in linear layers, in transposed ones, in stacks of experts.

Everywhere else such a matrix is a name and a weight [O, I], O outputs and I inputs. A linear layer's name is that
of its module; matrix e of a stack of experts, which transformers keeps as one parameter [E, O, I], is named
`<module>.<e>.<parameter>`, as if each expert were a module.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qat.quant import experts

PROBE = 2  # rows that a layer of unknown class is tested on


@dataclass(frozen=True)
class Place:
    """A matrix in a model: a parameter of a module, or one of those that a parameter stacks.

    Attributes:
        module: whose parameter it is.
        parameter: its name there.
        number: of the matrix in a stack; None for a layer's own.
        transposed: it is kept as [I, O].
    """

    module: nn.Module
    parameter: str = "weight"
    number: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The matrix [O, I], a view."""
        whole = self.module.get_parameter(self.parameter)
        matrix = whole if self.number is None else whole[self.number]
        return matrix.mT if self.transposed else matrix

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        outputs, inputs = self.module.get_parameter(self.parameter).shape[-2:]
        return (inputs, outputs) if self.transposed else (outputs, inputs)


def places(model: nn.Module) -> dict[str, Place]:
    """All matrices of a model that hidden states are multiplied with, by name, in its order."""
    found: dict[str, Place] = {}
    for name, module in model.named_modules():
        if (transposed := _transposed(module)) is not None:
            found[name] = Place(module, transposed=transposed)
        for parameter in experts.stacked(module):
            for number in range(len(module.get_parameter(parameter))):
                place = Place(module, parameter, number, experts.transposed(module))
                found[f"{name}.{number}.{parameter}"] = place
    return found


def place(model: nn.Module, name: str) -> Place | None:
    """The matrix of that name; None where the model has none."""
    if (module := _module(model, name)) is not None:
        if isinstance(module, nn.Embedding):
            return Place(module)
        transposed = _transposed(module)
        return None if transposed is None else Place(module, transposed=transposed)
    owner, number, parameter = experts.parsed(name)
    module = _module(model, owner)
    if module is None or parameter not in experts.stacked(module):
        return None
    inside = 0 <= number < len(module.get_parameter(parameter))
    return Place(module, parameter, number, experts.transposed(module)) if inside else None


def matrix(model: nn.Module, name: str) -> Tensor:
    """The matrix [O, I] of that name, a view: writing to it changes the model.

    Raises:
        KeyError: there is none.
    """
    found = place(model, name)
    if found is None:
        raise KeyError(name)
    return found.weight


def is_plain(model: nn.Module, name: str) -> bool:
    """Whether a matrix, if it is a linear layer's, is of one that torch's own code computes."""
    module = _module(model, name)
    return module is None or isinstance(module, nn.Embedding) or type(module).forward is nn.Linear.forward


def bias(model: nn.Module, name: str) -> nn.Parameter | None:
    """The bias [O] of the layer of that name; biases of stacks of experts stay where they are."""
    return cast(nn.Parameter | None, getattr(_module(model, name), "bias", None))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a matrix by a layer; a stack of experts that contains it is turned into layers first."""
    if _module(model, name) is None:
        owner, _, parameter = experts.parsed(name)
        experts.open(model.get_submodule(owner), parameter)
    model.set_submodule(name, module)
    experts.join(model, name)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # raised by torch where there is no such module
        return None


# By class of module: whether it stores its weight transposed; None where it is no linear layer.
_KNOWN: dict[type[nn.Module], bool | None] = {nn.Linear: False}


def _transposed(module: nn.Module) -> bool | None:
    """Whether a linear layer stores its weight as [I, O]; None for other modules.

    A class that is not torch's own is tried once: what it makes of a few rows says whether it is one.
    """
    kind, weight = type(module), module._parameters.get("weight")
    if isinstance(module, nn.Embedding):  # a try of so many rows would take long, and as much memory as it has
        return None
    if kind not in _KNOWN and weight is not None and weight.dim() == 2:
        _KNOWN[kind] = _tried(module, weight.shape)
    return _KNOWN.get(kind)


def _tried(module: nn.Module, shape: torch.Size) -> bool | None:
    """The answer of `_transposed` from a test with random parameters."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    for transposed in (False, True):
        matrix = weight.mT if transposed else weight
        x = torch.randn(PROBE, matrix.shape[1], generator=draw, dtype=torch.float32, device="cpu")
        values = {"weight": weight}
        if module._parameters.get("bias") is not None:
            values["bias"] = torch.randn(matrix.shape[0], generator=draw, dtype=torch.float32, device="cpu")
        try:
            made = torch.func.functional_call(module, values, (x,))
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError):
            continue  # foreign code may raise any error on inputs that it is not made for
        wanted = nn.functional.linear(x, matrix, values.get("bias"))
        if isinstance(made, Tensor) and made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-4):
            return transposed
    return None
