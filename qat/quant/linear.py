"""The quantized linear layer: `y = x Wᵀ` with `W = LUT[indices] ⊙ (A·g) @ B`, materialised for one product.

Computing it rank by rank is the same function at R times the cost. Training does not differentiate
through this module: `qat.quant.stack` writes the weights of many layers at once and turns their
gradients into those of tables and scales.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qat.quant import codebook
from qat.quant.scales import entry_sums

if TYPE_CHECKING:
    from qat.quant.weights import Weights


def look_up(lut: Tensor, indices: Tensor) -> Tensor:
    """`lut[indices]` for uint8 indices."""
    return torch.take(lut, indices.long())


def gradients(grad: Tensor, indices: Tensor, lut: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lut` [K], `A` [O, R] and `B` [R, I] from that of `W = lut[indices] ⊙ A @ B`.

    The table's is a masked sum for each entry: indexing under autograd would scatter millions of values
    into four addresses. The scales are computed again, which is cheaper than keeping them.

    Args:
        grad: of W [O, I], any floating type; reduced in fp32.
        indices: [O, I] uint8.
        lut: [K] fp32.
        A: [O, R] fp32, magnitudes included.
        B: [R, I] fp32.
    """
    grad = grad.to(lut.dtype)
    through = grad * (A @ B)
    if grad.device.type == "cpu":  # one pass; in float64, because it adds one after the other
        d_lut = torch.bincount(indices.flatten(), through.flatten().double(), len(lut)).to(lut.dtype)
    else:
        d_lut = entry_sums(through[None], indices[None], len(lut))[0]
    d_scale = grad * look_up(lut, indices)
    return d_lut, d_scale @ B.mT, A.mT @ d_scale


def nearest(latent: Tensor, lut: Tensor, scale: Tensor) -> Tensor:
    """Index [O, I] uint8 of the entry for which `lut[index] · scale` is nearest to the latent weight.

    The table need not be sorted: training may let two entries pass each other.
    """
    ascending, order = lut.sort()
    return order.to(torch.uint8)[codebook.nearest(codebook.relative(latent, scale)[None], ascending[None])[0].int()]


class QuantLinear(nn.Module):
    """A linear layer whose weight is a table look-up times a low-rank scale.

    Attributes:
        indices: [O, I] uint8.
        lut: [K] fp32, ascending at conversion.
        scale_A: [O, R] fp32, unit-norm columns at conversion.
        scale_B: [R, I] fp32, unit-norm rows at conversion.
        rank_magnitude: [R] fp32.
        latent: [O, I] fp32, the weight whose nearest entry each index is, while indices learn.
        curvature: [O] and [I] fp32, whose product is the loss's second derivative for each latent weight.
        bias: [O] or None, as in the layer it replaces.
        dense: W in a compute type while it is kept, which training and inference do.
        home: where W lies with others while it learns.
    """

    def __init__(self, outputs: int, inputs: int, bits: int, rank: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.rank = bits, rank
        self.indices: Tensor
        self.register_buffer("indices", torch.zeros(outputs, inputs, dtype=torch.uint8))
        self.lut = nn.Parameter(torch.zeros(2**bits, dtype=torch.float32))
        self.scale_A = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32))
        self.scale_B = nn.Parameter(torch.zeros(rank, inputs, dtype=torch.float32))
        self.rank_magnitude = nn.Parameter(torch.ones(rank, dtype=torch.float32))
        self.latent: nn.Parameter | None = None
        self.curvature: tuple[Tensor, Tensor] | None = None
        self.bias = bias
        self.dense: Tensor | None = None
        self.home: Weights | None = None

    @torch.no_grad()
    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], computed in fp32."""
        return (look_up(self.lut, self.indices) * ((self.scale_A * self.rank_magnitude) @ self.scale_B)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        weight = self.weight(x.dtype) if self.dense is None else self.dense
        return nn.functional.linear(x, weight, self.bias)

    def bake(self, dtype: torch.dtype) -> None:
        """Keeps W until `unbake`: for layers that do not learn, and for inference."""
        self.dense, self.home = self.weight(dtype), None

    def unbake(self) -> None:
        """Computes W anew at every call again."""
        self.dense, self.home = None, None

    @torch.no_grad()
    def normalized(self) -> dict[str, Tensor]:
        """The parameters with unit-norm columns of A and rows of B, their norms moved into g; the same W."""
        norm_A = self.scale_A.norm(dim=0).clamp_min(1e-12)
        norm_B = self.scale_B.norm(dim=1).clamp_min(1e-12)
        return {
            "lut": self.lut.detach().clone(),
            "scale_A": self.scale_A / norm_A,
            "scale_B": self.scale_B / norm_B[:, None],
            "rank_magnitude": self.rank_magnitude * norm_A * norm_B,
        }

    @torch.no_grad()
    def set_parameters(self, values: dict[str, Tensor]) -> None:
        """Takes over table and scales, as `normalized` gives them."""
        for name, value in values.items():
            getattr(self, name).copy_(value)


@torch.no_grad()
def grow(layer: QuantLinear, rank: int) -> QuantLinear:
    """The same function with more ranks: the new ones point anywhere, with magnitude zero, and may learn."""
    outputs, inputs = layer.indices.shape
    grown = QuantLinear(outputs, inputs, layer.bits, rank, layer.bias).to(layer.lut.device)
    draw = torch.Generator().manual_seed(0)
    new_A = torch.randn(outputs, rank, generator=draw, dtype=torch.float32)
    new_B = torch.randn(rank, inputs, generator=draw, dtype=torch.float32)
    grown.scale_A.copy_(new_A / new_A.norm(dim=0))
    grown.scale_B.copy_(new_B / new_B.norm(dim=1, keepdim=True))
    grown.rank_magnitude.zero_()
    for name, value in {"indices": layer.indices, "lut": layer.lut}.items():
        getattr(grown, name).copy_(value)
    grown.scale_A[:, : layer.rank] = layer.scale_A
    grown.scale_B[: layer.rank] = layer.scale_B
    grown.rank_magnitude[: layer.rank] = layer.rank_magnitude
    return grown.requires_grad_(False)


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@contextmanager
def baked(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every quantized weight computed once for all calls inside."""
    loose = [layer for layer in quantized(model).values() if layer.dense is None]
    for layer in loose:
        layer.bake(dtype)
    try:
        yield
    finally:
        for layer in loose:
            layer.unbake()
