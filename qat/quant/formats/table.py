"""A learned codebook for each layer, times a low-rank scale: `W = LUT[index] ⊙ (A·g) @ B`.

Shapes: N layers, O outputs, I inputs, K = 2^bits entries, R ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.quant.formats.base import Format, Grid, Part, Parts
from qat.quant.scales import entry_sums, look_up


@dataclass(frozen=True)
class Table(Format):
    """The format `table`.

    Parts: `lut` [K], ascending at conversion; `scale_A` [O, R], unit-norm columns at conversion; `scale_B` [R, I],
    unit-norm rows; `rank_magnitude` [R]. Operands: `lut`, `A` [O, R] with magnitudes, `B`.
    """

    bits: int
    rank: int

    name = "table"

    def settings(self) -> dict[str, Any]:
        """Bits and rank."""
        return {"bits": self.bits, "rank": self.rank}

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Codebook and scales."""
        return {
            "lut": Part((2**self.bits,), "codebooks"),
            "scale_A": Part((outputs, self.rank), "scales"),
            "scale_B": Part((self.rank, inputs), "scales"),
            "rank_magnitude": Part((self.rank,), "scales"),
        }

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """A file in fp16 keeps the norms of B's rows in A."""
        A = parts["scale_A"] * parts["rank_magnitude"][:, None]
        if not snap:
            return {"lut": parts["lut"], "A": A, "B": parts["scale_B"]}
        norm = _norms(parts["scale_B"])
        return {"lut": _half(parts["lut"]), "A": _half(A * norm.mT), "B": _half(parts["scale_B"] / norm)}

    def grid(self, operands: Parts) -> Grid:
        """Codebook and scales."""
        return Grid(operands["lut"], operands["A"] @ operands["B"])

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """The codebook's is a masked sum for each entry: indexing under autograd would scatter millions of values
        into four addresses. The scales are computed again, which is cheaper than keeping them."""
        lut, A, B = operands["lut"], operands["A"], operands["B"]
        grad_NOI = grad_NOI.to(lut.dtype)
        d_lut = entry_sums(grad_NOI * (A @ B), index_NOI, lut.shape[1])
        d_scale = grad_NOI * look_up(lut, index_NOI)
        return {"lut": d_lut, "A": d_scale @ B.mT, "B": A.mT @ d_scale}

    def back(self, gradients: Parts, parts: Parts, snap: bool = False) -> Parts:
        """Those of A are shared by `scale_A` and its magnitudes."""
        d_A, d_B = gradients["A"], gradients["B"]
        if snap:
            norm = _norms(parts["scale_B"])
            d_A, d_B = d_A * norm.mT, d_B / norm
        return {
            "lut": gradients["lut"],
            "scale_A": d_A * parts["rank_magnitude"][:, None],
            "scale_B": d_B,
            "rank_magnitude": (d_A * parts["scale_A"]).sum(1),
        }

    def normalized(self, parts: Parts) -> Parts:
        """Unit-norm columns of A and rows of B, their norms moved into the magnitudes."""
        norm_A = parts["scale_A"].norm(dim=1).clamp_min(1e-12)
        norm_B = parts["scale_B"].norm(dim=2).clamp_min(1e-12)
        return {
            "lut": parts["lut"].clone(),
            "scale_A": parts["scale_A"] / norm_A[:, None],
            "scale_B": parts["scale_B"] / norm_B[:, :, None],
            "rank_magnitude": parts["rank_magnitude"] * norm_A * norm_B,
        }

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, scales with their magnitudes, and the codebook."""
        return self.bits * outputs * inputs + 16 * (self.rank * (outputs + inputs) + 2**self.bits)

    def kernels(self, device: torch.device) -> Any:
        """Triton kernels on CUDA."""
        if device.type != "cuda":
            return None
        from qat.quant import kernels as table_kernels

        return table_kernels if table_kernels.AVAILABLE else None


def _norms(B: Tensor) -> Tensor:
    """Norms [N, R, 1] of B's rows."""
    return B.norm(dim=2, keepdim=True).clamp_min(1e-12)


def _half(x: Tensor) -> Tensor:
    return x.half().float()
