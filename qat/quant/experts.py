"""Stacks of experts: splits one parameter of transformers into layers, and joins them for the model's own code.

transformers keeps the matrices of all experts of a block as one parameter [E, O, I] (or [E, I, O]), and its code
indexes it or multiplies with all of it at once. To quantize each matrix by itself the parameter is opened: the
module gets a child for each expert, named by its number, with a layer for each of its matrices, and what was the
parameter is made of these layers whenever it is read. So a model's own code computes it, whatever that does.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

# Classes of experts that store matrices as [I, O] without setting transformers' `is_transposed`.
TRANSPOSED = ("Llama4TextExperts",)


def stacked(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that stack matrices, one for each expert."""
    if "Experts" not in type(module).__name__:
        return []
    return [name for name, value in module._parameters.items() if value is not None and value.dim() == 3]


def transposed(module: nn.Module) -> bool:
    """Whether a module of experts stores its matrices as [I, O]."""
    return bool(getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED))


def parsed(name: str) -> tuple[str, int, str]:
    """Module, number and parameter of `<module>.<e>.<parameter>`; the number is −1 for any other name."""
    owner, _, parameter = name.rpartition(".")
    owner, _, number = owner.rpartition(".")
    return owner, int(number) if number.isdecimal() else -1, parameter


class Stack:
    """The layers of one opened parameter, and the parameter made of them.

    What is made of weights that are kept (in training, and for inference) is kept with them: they become views of it.
    """

    def __init__(self, module: nn.Module, parameter: str, dtype: torch.dtype) -> None:
        self._module, self._parameter, self._dtype = module, parameter, dtype
        self._whole: Tensor | None = None
        self._made_of: list[Tensor] = []

    @property
    def layers(self) -> list[Any]:
        """The layers, one for each expert, in order."""
        return [child._modules[self._parameter] for child in _children(self._module)]

    def __call__(self) -> Tensor:
        """The parameter [E, O, I], or [E, I, O] where the module keeps it like that.

        In training it is a leaf of autograd, whose gradient goes where those of the layers go.
        """
        layers, dtype = self.layers, self._module.get_buffer(LIKE).dtype
        weights = [_weight(layer, dtype) for layer in layers]
        same = dtype == self._dtype and _same(weights, self._made_of)
        whole = self._whole if same and self._whole is not None else self._joined(layers, weights)
        return whole.mT if transposed(self._module) else whole

    def _joined(self, layers: list[Any], weights: list[Tensor]) -> Tensor:
        homes = {getattr(layer, "home", None) for layer in layers}
        home = homes.pop() if len(homes) == 1 else None
        whole = None if home is None else home.stacked(layers)
        if whole is None and (not self._lasting(layers, weights)):
            return torch.stack(weights)
        self._whole = self._views(layers, weights) if whole is None else whole
        self._made_of = [_weight(layer, self._dtype) for layer in layers]
        return self._whole

    def _lasting(self, layers: list[Any], weights: list[Tensor]) -> bool:
        """Whether weights stay valid: not trained, not made for this call only, and in their usual type."""
        kept = [isinstance(layer, nn.Linear) or layer.dense is x for layer, x in zip(layers, weights, strict=True)]
        return all(kept) and not any(x.requires_grad or x.dtype != self._dtype for x in weights)

    @staticmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def _views(layers: list[Any], weights: list[Tensor]) -> Tensor:
        """All weights as one tensor; the layers' own weights become views of it."""
        whole = torch.stack(weights)
        for layer, view in zip(layers, whole, strict=True):
            if isinstance(layer, nn.Linear):
                layer.weight.data = view
            else:
                layer.dense = view
        return whole


LIKE = "like"  # name of an empty buffer that has a module's type and device


def open(module: nn.Module, parameter: str) -> None:
    """Turns a parameter of a module of experts into layers."""
    whole = cast(nn.Parameter, module._parameters.pop(parameter))
    matrices = (whole.mT if transposed(module) else whole).detach()
    for number, matrix in enumerate(matrices):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        if str(number) not in module._modules:
            module.add_module(str(number), nn.Module())
        module.get_submodule(str(number)).add_module(parameter, linear)
    if LIKE not in module._buffers:
        module.register_buffer(LIKE, whole.new_empty(0), persistent=False)
    module.__class__ = _opened(type(module), parameter)  # type: ignore[arg-type]
    vars(module)["_is_hf_initialized"] = True  # otherwise transformers initialises these weights with random numbers
    vars(module)[STACK + parameter] = Stack(module, parameter, whole.dtype)


def join(model: nn.Module, name: str) -> None:
    """Sets the stack of a layer that replaces an expert's matrix."""
    owner, number, parameter = parsed(name)
    if number >= 0 and (stack := vars(model.get_submodule(owner)).get(STACK + parameter)) is not None:
        vars(model.get_submodule(name))["stack"] = stack


STACK = "stack_of_"  # prefix of a stack's attribute in a module of experts; the parameter's name follows


@cache
def _opened(kind: type[nn.Module], parameter: str) -> type[nn.Module]:
    """A subclass of `kind` whose attribute `parameter` is computed from the layers."""
    made = property(lambda module: vars(module)[STACK + parameter]())
    return type(kind.__name__, (kind,), {parameter: made, "__module__": kind.__module__})


def _children(module: nn.Module) -> list[nn.Module]:
    """The children of a module, one for each expert, in order."""
    numbers = sorted(int(name) for name in module._modules if name.isdecimal())
    return [module.get_submodule(str(number)) for number in numbers]


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """A layer's weight [O, I]: the kept one, else computed."""
    weight: Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.held(dtype)
    return weight


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def home(model: nn.Module, name: str) -> tuple[nn.Module, str, int] | None:
    """Module, parameter and number of a matrix of a stack, opened or not; None for any other name."""
    owner, number, parameter = parsed(name)
    if number < 0:
        return None
    module = model.get_submodule(owner)
    if not (parameter in stacked(module) or STACK + parameter in vars(module)):
        return None
    return module, parameter, number
