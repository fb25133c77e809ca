"""A linear layer whose weight stays packed: bit stream of indices, all else in 16 bits.

On a CPU and on Apple's GPU the weight is multiplied out at the first call and kept, because one dense
product is faster there than unpacking at each token. On CUDA it stays packed: one token at a time goes
through a fused kernel, more of them through a weight that lives for one product.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.quant import packing
from qat.quant.formats import Format, Parts

SIXTEEN = torch.float16  # parts of formats are of order one or below, where fp16 has three bits more than bf16


class PackedLinear(nn.Module):
    """`y = x Wᵀ + bias`, W in a format of few bits.

    Besides what follows it has the format's parts as fp16 buffers under their own names.

    Attributes:
        format: what W is.
        indices: [ceil(O · I · bits / 8)] uint8, the bit stream of `qat.quant.packing`.
        bias: [O] in the model's type, or None.
    """

    def __init__(self, format: Format, outputs: int, inputs: int, bias: bool) -> None:
        super().__init__()
        self.format, self.out_features, self.in_features = format, outputs, inputs
        self.indices: Tensor
        size = packing.packed_bytes(outputs * inputs, format.bits)
        self.register_buffer("indices", torch.zeros(size, dtype=torch.uint8))
        for name, part in format.parts(outputs, inputs).items():
            self.register_buffer(name, torch.zeros(part.shape, dtype=SIXTEEN))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None
        self.dense: Tensor | None = None

    def parts(self) -> Parts:
        """The format's parts by name, as they are."""
        return {name: self.get_buffer(name) for name in self.format.parts(self.out_features, self.in_features)}

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], multiplied out in fp32 and rounded once."""
        index = packing.unpack(self.indices, self.format.bits, (self.out_features, self.in_features))
        return self.format.weight(index, {name: part.float() for name, part in self.parts().items()}).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        if x.is_cuda:
            one = x.numel() == self.in_features and not torch.is_grad_enabled()
            if one and (product := self.format.product()) is not None:
                y = product(x.reshape(-1), self.indices, self.parts()).view(*x.shape[:-1], -1)
                return y if self.bias is None else y + self.bias
            return nn.functional.linear(x, self.weight(x.dtype), self.bias)
        if self.dense is None or self.dense.dtype != x.dtype:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = self.weight(x.dtype)
        return nn.functional.linear(x, self.dense, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Forgets the dense weight when the layer moves or changes its type."""
        self.dense = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"
