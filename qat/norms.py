"""The trained normalisation layers of a model and their fp32 weights.

The model holds them rounded to the compute type. The fp32 tensor lies beside, as `learned` of its module,
so that whoever saves the model finds it.
"""

import torch
from torch import Tensor, nn


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers with a weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def learned(model: nn.Module) -> dict[str, Tensor]:
    """fp32 weights of the layers that learned, as `<layer>.weight`."""
    return {
        f"{name}.weight": vars(module)["learned"] for name, module in norms(model).items() if "learned" in vars(module)
    }


@torch.no_grad()
def set_learned(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives layers other weights, `<layer>.weight` as `learned` gives them."""
    for name, module in norms(model).items():
        if (value := weights.get(f"{name}.weight")) is not None:
            module.weight.copy_(value)  # type: ignore[operator]
            vars(module)["learned"] = value.to(module.weight.device)  # type: ignore[arg-type]
