"""Linear layers, embeddings and heads whose weight stays packed: a bit stream of indices, and parts in 16 bits.

On a CPU and on Apple's GPU a product's weight is multiplied out at the first call and kept, because one dense
product is faster there than unpacking at each token. On CUDA it stays packed: one token at a time goes
through a fused kernel, more of them through a weight that lives for one product. A matrix of vocabulary × hidden is
never multiplied out whole there, but some rows at a time; and whatever the device, of an embedding only the rows of
the tokens at hand are, unless its head has made the rest.

Shapes: O outputs, I inputs, V tokens, D hidden, X rows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.quant import packing, places
from qat.quant.embedding import each, through, untie, without_weight
from qat.quant.formats import Format, Part, Parts
from qat.quant.places import bias, place

# Type of stored parts: they are of order one or below, where fp16 has three bits more than bf16
SIXTEEN = torch.float16
ROWS = 1 << 13  # rows of a matrix that are decoded at a time on CUDA; a multiple of 8, so that they end at a whole byte


def stored(part: Part, value: Tensor) -> Tensor:
    """A part as it is stored: in fp16, or whole numbers minus the lowest one as a bit stream."""
    if part.bits == SIXTEEN.itemsize * 8:
        return value.to(SIXTEEN)
    return packing.pack((value - part.lowest).to(torch.uint8), part.bits)


def room(part: Part) -> Tensor:
    """Zeros of the type and shape of the stored part."""
    if part.bits == SIXTEEN.itemsize * 8:
        return torch.zeros(part.shape, dtype=SIXTEEN)
    return torch.zeros(-(-math.prod(part.shape) * part.bits // 8), dtype=torch.uint8)


def read(part: Part, value: Tensor) -> Tensor:
    """The inverse of `stored`, fp32."""
    if value.is_floating_point():
        return value.float()
    return packing.unpack(value, part.bits, part.shape).float() + part.lowest


class Packed(nn.Module):
    """A matrix in a format of few bits, whatever it is used for.

    Besides what follows it has the format's parts as buffers under their own names, as `stored` makes them.

    Attributes:
        format: what W is.
        indices: [ceil(O · I · bits / 8)] uint8, the bit stream of `qat.quant.packing`.
        dense: W while it is kept.
        operands: those of the format, in fp32, while rows are looked up.
    """

    def __init__(self, format: Format, outputs: int, inputs: int) -> None:
        super().__init__()
        self.format, self.out_features, self.in_features = format, outputs, inputs
        self.indices: Tensor
        size = packing.packed_bytes(outputs * inputs, format.bits)
        self.register_buffer("indices", torch.zeros(size, dtype=torch.uint8))
        for name, part in format.parts(outputs, inputs).items():
            self.register_buffer(name, room(part))
        self.dense: Tensor | None = None
        self.operands: Parts | None = None

    def parts(self) -> Parts:
        """The format's parts by name, as they are."""
        return {name: self.get_buffer(name) for name in self.format.parts(self.out_features, self.in_features)}

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], computed in fp32 and rounded once."""
        described = self.format.indices(self.out_features, self.in_features)
        index = packing.unpack(self.indices, described.bits, described.shape)
        return self.format.weight(index, self._wide()).to(dtype)

    def held(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], kept for further calls where that is faster."""
        return self.weight(dtype) if self.indices.is_cuda else self.kept(dtype)

    def kept(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], kept for the next call."""
        if self.dense is None or self.dense.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = self.weight(dtype)
        return self.dense

    def rows(self, rows_X: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows [X, I] of W; no other rows are decoded."""
        if self.dense is not None and self.dense.dtype == dtype:
            return self.dense[rows_X]
        if self.operands is None:
            with torch.inference_mode(False), torch.no_grad():
                self.operands = self.format.operands(self._wide())
        rowwise = self.format.rowwise
        chosen = {name: value[rows_X] if name in rowwise else value for name, value in self.operands.items()}
        described = self.format.indices(self.out_features, self.in_features)
        index = packing.unpack_rows(self.indices, described.bits, rows_X, described.shape[1])
        return self.format.grid(chosen).at(index).to(dtype)

    def fused(self, x: Tensor) -> Tensor | None:
        """`W x` [..., O] of a single token on CUDA [..., I], where the format has a kernel for it."""
        one = x.is_cuda and x.numel() == self.in_features and not torch.is_grad_enabled()
        if not one or (product := self.format.product()) is None:
            return None
        return product(x.reshape(-1), self.indices, self.parts()).view(*x.shape[:-1], -1)

    def _wide(self) -> Parts:
        described = self.format.parts(self.out_features, self.in_features)
        return {name: read(described[name], value) for name, value in self.parts().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Forgets the dense weight and the operands when the layer moves or changes its type."""
        self.dense = self.operands = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


class PackedLinear(Packed):
    """`y = x Wᵀ + bias`.

    Attributes:
        bias: [O] in the model's type, or None.
    """

    def __init__(self, format: Format, outputs: int, inputs: int, bias: bool) -> None:
        super().__init__(format, outputs, inputs)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    @property
    def qweight(self) -> Tensor:
        """The indices, under the name by which PEFT asks where a packed weight lies."""
        return self.indices

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        if (y := self.fused(x)) is not None:
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.held(x.dtype), self.bias)


class PackedHead(PackedLinear):
    """The linear layer before the logits."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to logits [..., V], in the type of x."""
        return logits(self, x, self.bias)


class PackedEmbedding(Packed):
    """Looks up the rows of tokens, and passes them through the model's own class.

    Attributes:
        plain: the module in whose place it is, without a weight.
        like: empty, in the type of rows.
    """

    def __init__(self, format: Format, embedding: nn.Embedding) -> None:
        super().__init__(format, *embedding.weight.shape)
        self.like: Tensor
        self.register_buffer("like", embedding.weight.detach().new_empty(0), persistent=False)
        self.plain = without_weight(embedding)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [...] to [..., D]."""
        return through(self.plain, self.rows(input_ids.flatten(), self.like.dtype), each(input_ids))


class PackedTiedHead(nn.Module):
    """The logits' product with a packed embedding; the matrix belongs to the embedding."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding, self.bias = (embedding,), bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to logits [..., V], in the type of x."""
        return logits(self._embedding[0], x, self.bias)


def logits(matrix: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + bias` [..., V]; the whole W exists only where it is kept."""
    if (y := matrix.fused(x)) is None:
        if not x.is_cuda:
            return nn.functional.linear(x, matrix.kept(x.dtype), bias)
        rows = torch.arange(matrix.out_features, device=x.device).split(ROWS)
        y = torch.cat([x @ matrix.rows(some, x.dtype).mT for some in rows], -1)
    return y if bias is None else y + bias


def put(model: Any, name: str, format: Format) -> None:
    """Puts an empty packed module in place of a dense one, and of the head where it is tied to that."""
    old, head, added = place(model, name), model.get_output_embeddings(), bias(model, name)
    if old is None:
        raise KeyError(name)
    made: Packed
    if isinstance(old.module, nn.Embedding):
        made = PackedEmbedding(format, old.module)
        for other in untie(model, name)[:1]:
            model.set_submodule(other.removesuffix(".weight"), PackedTiedHead(made, head.bias))
    else:
        kind = PackedHead if old.module is head else PackedLinear
        made = kind(format, *old.shape, added is not None)
        if made.bias is not None:
            made.bias.data = made.bias.data.to(old.weight.dtype)
    places.put(model, name, made)
