"""Low-rank adapters: a product of two narrow matrices beside a frozen weight (Hu et al. 2021, "LoRA", section 4.1).

Whatever computes with a layer's weight computes with its adapter too: the layer itself, and the fused decoder layers
of training (`qat.decoder`). What is read of a layer without a product (its weight, its parts) is without it.

Shapes: R rank, O outputs, I inputs.
"""

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qat.seeds import generator

if TYPE_CHECKING:
    from qat.quant.linear import QuantLinear


class Adapter(nn.Module):
    """`alpha / R · B A x`.

    Attributes:
        A: [R, I] fp32.
        B: [O, R] fp32, zero at first, so that nothing is added.
        alpha: the weight of all ranks together, as PEFT's `lora_alpha`.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, alpha: float) -> None:
        """Creates both matrices, all zero."""
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, inputs, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32))
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A)

    @torch.no_grad()
    def draw(self, random: torch.Generator) -> None:
        """Draws A as PEFT does: uniform within 1 / √I (`kaiming_uniform_` with a = √5)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.copy_(torch.empty(self.A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        inner = nn.functional.linear(x, self.A.to(x.dtype)) * (self.alpha / self.rank)
        return nn.functional.linear(inner, self.B.to(x.dtype))

    @torch.no_grad()
    def weight(self) -> Tensor:
        """What it adds to the layer's weight: [O, I] fp32."""
        return (self.B @ self.A) * (self.alpha / self.rank)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the names of their layers, in its order."""
    found = {name.removesuffix(".adapter"): module for name, module in model.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, Adapter)}


def put(layer: "QuantLinear", rank: int, alpha: float) -> Adapter:
    """Gives a layer an adapter of zeros, on its device."""
    with layer.indices.device:
        layer.adapter = Adapter(layer.outputs, layer.inputs, rank, alpha)
    return layer.adapter


def begin(layers: "dict[str, QuantLinear]", rank: int, alpha: float, seed: int) -> None:
    """Gives layers without an adapter one that adds nothing yet; what is drawn depends on the seed and the order."""
    for number, layer in enumerate(layers.values()):
        if layer.adapter is None:
            put(layer, rank, alpha).draw(generator(seed, number))


def remove(model: nn.Module) -> None:
    """Takes the adapters off a model."""
    for name in adapters(model):
        cast("QuantLinear", model.get_submodule(name)).adapter = None


def size(model: nn.Module) -> int:
    """Numbers in all adapters of a model."""
    return sum(cast(Tensor, parameter).numel() for one in adapters(model).values() for parameter in one.parameters())
