"""Quantized matrices, which compute W from indices and a format's parts, and linear layers with such weights.

For codebooks, computing it rank by rank is the same function at R times the cost. Training does not differentiate
through this module: `qat.quant.stack` writes the weights of many layers at once and turns their gradients into
those of the parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qat.quant.adapter import Adapter
from qat.quant.formats import Format, Grid, Parts
from qat.quant.lookup import index_type

if TYPE_CHECKING:
    from qat.quant.experts import Stack
    from qat.quant.weights import Weights


TOGETHER = 1 << 23  # weights that are computed at a time: they take 8 to 16 bytes each meanwhile


class Quantized(nn.Module):
    """A matrix in a format of few bits, whatever it is used for.

    Besides what follows it has the format's parts as fp32 parameters under their own names.

    Attributes:
        format: what the weight is.
        outputs, inputs: O and I.
        indices: [O, I] uint8, for vectors as `Format.indices` says.
        latent: [O, I] fp32, the weight whose nearest value each index is, while indices learn.
        curvature: [O] and [I] fp32, whose product is the loss's second derivative for each latent weight.
        dense: W in a compute type while it is kept, which training and inference do.
        home: where W lies with others while it learns.
        stack: the stack of experts that W is a matrix of; None for a layer of its own.
    """

    several: bool = False  # whether one backward pass adds several gradients to this weight

    def __init__(self, format: Format, outputs: int, inputs: int) -> None:
        """Creates indices and parts, all zero."""
        super().__init__()
        self.format, self.outputs, self.inputs = format, outputs, inputs
        self.indices: Tensor
        indices = format.indices(outputs, inputs)
        self.register_buffer("indices", torch.zeros(indices.shape, dtype=index_type(2**indices.bits)))
        for name, part in format.parts(outputs, inputs).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(part.shape, dtype=torch.float32)))
        self.latent: nn.Parameter | None = None
        self.curvature: tuple[Tensor, Tensor] | None = None
        self.dense: Tensor | None = None
        self.home: Weights | None = None
        self.stack: Stack | None = None

    def take_over(self, old: nn.Module) -> None:
        """Takes over what the replaced module has besides its weight."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """The format's parts by name, as they are."""
        return {name: self.get_parameter(name) for name in self.format.parts(self.outputs, self.inputs)}

    @torch.no_grad()
    def grid(self) -> Grid:
        """The values that its weights can take."""
        return self.format.grid(self.format.operands(self.parts()))

    @torch.no_grad()
    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], computed in fp32; of large matrices some rows at a time, as scales and indices take more memory."""
        if self.indices.numel() <= TOGETHER:
            return self.format.weight(self.indices, self.parts()).to(dtype)
        made = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.indices.device)
        for rows in torch.arange(self.outputs, device=made.device).split(max(1, TOGETHER // self.inputs)):
            made[rows[0] : rows[-1] + 1] = self._rows(rows)
        return made

    def _rows(self, numbers_X: Tensor) -> Tensor:
        """Rows [X, I] of W with these numbers, fp32."""
        operands, rowwise = self.format.operands(self.parts()), self.format.rowwise
        chosen = {name: value[numbers_X] if name in rowwise else value for name, value in operands.items()}
        return self.format.grid(chosen).at(self.indices[numbers_X])

    def held(self, dtype: torch.dtype) -> Tensor:
        """W [O, I]: the kept one, else computed."""
        return self.weight(dtype) if self.dense is None else self.dense

    def bake(self, dtype: torch.dtype) -> None:
        """Keeps W until `unbake`: for layers that do not learn, and for inference."""
        self.dense, self.home = self.weight(dtype), None

    def unbake(self) -> None:
        """Lets W be computed again at every call."""
        self.dense, self.home = None, None

    @torch.no_grad()
    def normalized(self) -> Parts:
        """Parts of the same W in the form that files have."""
        return self.format.normalized(self.parts())

    @torch.no_grad()
    def set_parts(self, values: Parts) -> None:
        """Takes over parts, by name."""
        for name, value in values.items():
            self.get_parameter(name).copy_(value)


class QuantLinear(Quantized):
    """A linear layer, `y = x Wᵀ + bias`, and what an adapter adds.

    Attributes:
        bias: [O] or None, as in the layer it replaces.
        adapter: a low-rank adapter, or None. W is without it.
    """

    def __init__(self, format: Format, outputs: int, inputs: int, bias: Tensor | None = None) -> None:
        """Creates indices and parts, all zero."""
        super().__init__(format, outputs, inputs)
        self.bias = bias
        self.adapter: Adapter | None = None

    def take_over(self, old: nn.Module) -> None:
        """Takes over the bias."""
        self.bias = cast(Tensor | None, old.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        weight = self.weight(x.dtype) if self.dense is None else self.dense
        y = nn.functional.linear(x, weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class QuantHead(QuantLinear):
    """The linear layer before the logits, where it is not tied to the embedding."""

    several = True  # adds a gradient for each chunk of positions


@torch.no_grad()
def kept(layer: Quantized, format: Format) -> Quantized | None:
    """The same weights and indices in another format, in host memory; None where that is impossible."""
    parts = format.kept(layer.parts(), layer.format)
    if parts is None:
        return None
    made = type(layer)(format, layer.outputs, layer.inputs)
    made.take_over(layer)
    made.indices.copy_(layer.indices)
    made.set_parts(parts)
    return made.requires_grad_(False)


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """The quantized matrices by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


@contextmanager
def baked(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every quantized weight is computed once and kept."""
    loose = [layer for layer in quantized(model).values() if layer.dense is None]
    for layer in loose:
        layer.bake(dtype)
    try:
        yield
    finally:
        for layer in loose:
            layer.unbake()
