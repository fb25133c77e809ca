"""A linear layer whose weight stays packed: bit stream of indices, table and scales in 16 bits.

On a CPU and on Apple's GPU the weight is multiplied out at the first call and kept, because one dense
product is faster there than unpacking at each token. On CUDA it stays packed: one token at a time goes
through a fused kernel, more of them through a weight that lives for one product.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.packed import kernel
from qat.quant import packing

SIXTEEN = torch.float16  # tables and scales are of order one or below, where fp16 has three bits more than bf16


class PackedLinear(nn.Module):
    """`y = x Wᵀ + bias` with `W = LUT[indices] ⊙ (A·g) @ B`.

    Attributes:
        indices: [ceil(O · I · bits / 8)] uint8, the bit stream of `qat.quant.packing`.
        lut: [2**bits] fp16.
        scale_A: [O, R] fp16.
        scale_B: [R, I] fp16.
        rank_magnitude: [R] fp16.
        bias: [O] in the model's type, or None.
    """

    def __init__(self, outputs: int, inputs: int, bits: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bits = outputs, inputs, bits
        self.indices: Tensor
        self.lut: Tensor
        self.scale_A: Tensor
        self.scale_B: Tensor
        self.rank_magnitude: Tensor
        self.register_buffer("indices", torch.zeros(-(-outputs * inputs * bits // 8), dtype=torch.uint8))
        self.register_buffer("lut", torch.zeros(2**bits, dtype=SIXTEEN))
        self.register_buffer("scale_A", torch.zeros(outputs, rank, dtype=SIXTEEN))
        self.register_buffer("scale_B", torch.zeros(rank, inputs, dtype=SIXTEEN))
        self.register_buffer("rank_magnitude", torch.zeros(rank, dtype=SIXTEEN))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None
        self.dense: Tensor | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], multiplied out in fp32 and rounded once."""
        index = packing.unpack(self.indices, self.bits, (self.out_features, self.in_features))
        look_up = self.lut.float().index_select(0, index.flatten().int()).view(index.shape)
        return (look_up * (self.magnified() @ self.scale_B.float())).to(dtype)

    def magnified(self) -> Tensor:
        """A · g [O, R] fp32."""
        return self.scale_A.float() * self.rank_magnitude.float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O], in the type of x."""
        if x.is_cuda:
            if x.numel() == self.in_features and kernel.AVAILABLE and not torch.is_grad_enabled():
                parts = (self.indices, self.lut, self.scale_A, self.rank_magnitude, self.scale_B)
                y = kernel.product(x.reshape(-1), *parts, self.bits).view(*x.shape[:-1], -1)
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
        rank = len(self.rank_magnitude)
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, rank={rank}"
