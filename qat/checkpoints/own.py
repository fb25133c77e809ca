"""Parameters besides the quantized ones in which a student differs from its teacher.

A student of ours takes embeddings, norms and head from the teacher. An imported one may bring its own;
they are kept beside the model as they were read, so that saving it again does not round them to the
type that it happened to run in.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat import tensor_files
from qat.norms import learned
from qat.quant.linear import quantized
from qat.tensor_files import FLOATS, Wanted

FILE = "own.safetensors"
ATTRIBUTE = "own_parameters"


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The student's own parameters by name, exactly as read; empty where all are the teacher's."""
    return cast(dict[str, Tensor], getattr(model, ATTRIBUTE, {}))


@torch.no_grad()
def adopt(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a student's own parameters into a model, which remembers them."""
    for name, value in tensors.items():
        model.get_parameter(name).copy_(value)
    setattr(model, ATTRIBUTE, tensors)


def read_own(path: Path, model: nn.Module, remedy: str) -> dict[str, Tensor]:
    """Reads a student's own parameters from a checkpoint's file; the model's quantized layers must be in place.

    Raises:
        ArtifactError: the file is damaged, or holds something that is no parameter outside of the quantized layers.
    """
    inside = tuple(f"{name}." for name in quantized(model))
    kept = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside) or name.endswith(".bias")
    }
    wanted = {name: Wanted(FLOATS, tuple(parameter.shape)) for name, parameter in kept.items()}
    return tensor_files.read(path, wanted, remedy, some=True)


def write_own(model: nn.Module, folder: Path, besides: Iterable[str] = ()) -> None:
    """Writes a model's own parameters and its trained norms beside the quantized layers; no file where there are none.

    The weights of the modules named in `besides` are left out, because they are about to be quantized.
    """
    gone = {id(getattr(model.get_submodule(name), "weight", None)) for name in besides}
    own = {name: value for name, value in own_parameters(model).items() if id(model.get_parameter(name)) not in gone}
    if tensors := own | learned(model):
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / FILE)
