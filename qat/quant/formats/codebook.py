"""A learned codebook for each layer, times a low-rank scale: `W = codebook[index] ⊙ (A·g) @ B`.

Shapes: N layers, O outputs, I inputs, K entries, R ranks; D numbers of an entry that is a vector.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant.curvature import Curvature
from qat.quant.formats import codebook_fit
from qat.quant.formats.base import Cluster, Equations, Fitted, Format, Grid, Kernels, Misfit, Part, Parts, Product
from qat.quant.formats.codebook_fit import Codebooks
from qat.quant.lookup import entry_sums, look_up


@dataclass(frozen=True)
class LowRank(Format):
    """What formats with a codebook and low-rank scales have in common; entries are numbers or vectors.

    Parts: `codebook` [K] or [K, D]; `scale_A` [O, R], unit-norm columns at conversion; `scale_B` [R, I], unit-norm
    rows; `rank_magnitude` [R]. Operands: `codebook`, `A` [O, R] with magnitudes, `B`.
    """

    rank: int

    @property
    def entries(self) -> int:
        """K."""
        return int(2 ** (self.bits * self.dim))

    @property
    def rowwise(self) -> tuple[str, ...]:
        """A."""
        return ("A",)

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Codebook and scales."""
        return {
            "codebook": Part((self.entries,) if self.dim == 1 else (self.entries, self.dim), "codebooks"),
            "scale_A": Part((outputs, self.rank), "scales"),
            "scale_B": Part((self.rank, inputs), "scales"),
            "rank_magnitude": Part((self.rank,), "scales"),
        }

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """Codebook, A and B; a file in fp16 keeps the norms of B's rows in A."""
        A = parts["scale_A"] * parts["rank_magnitude"][..., None, :]
        if not snap:
            return {"codebook": parts["codebook"], "A": A, "B": parts["scale_B"]}
        norm = _norms(parts["scale_B"])
        return {"codebook": _half(parts["codebook"]), "A": _half(A * norm.mT), "B": _half(parts["scale_B"] / norm)}

    def grid(self, operands: Parts) -> Grid:
        """Codebook and scales."""
        return Grid(operands["codebook"], operands["A"] @ operands["B"])

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """The codebook's gradient is a masked sum for each entry: autograd's indexing would scatter millions of values
        into four addresses. The scales are computed again, which is cheaper than keeping them."""
        codebook, A, B = operands["codebook"], operands["A"], operands["B"]
        grad_NOI = grad_NOI.to(codebook.dtype)
        d_codebook = entry_sums(grad_NOI * (A @ B), index_NOI, self.entries)
        d_scale = grad_NOI * look_up(codebook, index_NOI)
        return {"codebook": d_codebook, "A": d_scale @ B.mT, "B": A.mT @ d_scale}

    def distribute(self, gradients: Parts, parts: Parts, found: Parts, snap: bool = False) -> None:
        """Splits the gradient of A between `scale_A` and the magnitudes."""
        d_A, d_B = gradients["A"], gradients["B"]
        if snap:
            norm = _norms(parts["scale_B"])
            d_A, d_B = d_A * norm.mT, d_B / norm
        torch.mul(d_A, parts["rank_magnitude"][..., None, :], out=found["scale_A"])
        torch.sum(d_A * parts["scale_A"], -2, out=found["rank_magnitude"])
        found["scale_B"].copy_(d_B)

    def stored(self, operands: Parts) -> Parts:
        """Parts with unit norms; magnitudes are the norms of A's columns times those of B's rows."""
        codebook, A, B = (operands[name] for name in ("codebook", "A", "B"))
        ones = torch.ones_like(A[..., 0, :])
        return self.normalized({"codebook": codebook, "scale_A": A, "scale_B": B, "rank_magnitude": ones})

    def normalized(self, parts: Parts) -> Parts:
        """Unit-norm columns of A and rows of B, their norms moved into the magnitudes."""
        norm_A = parts["scale_A"].norm(dim=-2).clamp_min(1e-12)
        norm_B = parts["scale_B"].norm(dim=-1).clamp_min(1e-12)
        return {
            "codebook": parts["codebook"].clone(),
            "scale_A": parts["scale_A"] / norm_A[..., None, :],
            "scale_B": parts["scale_B"] / norm_B[..., None],
            "rank_magnitude": parts["rank_magnitude"] * norm_A * norm_B,
        }

    def kept(self, parts: Parts, older: Format) -> Parts | None:
        """The parts with more ranks; new ranks have any direction and magnitude zero, and can learn."""
        if not isinstance(older, LowRank) or replace(older, rank=self.rank) != self or older.rank > self.rank:
            return None
        draw = torch.Generator().manual_seed(0)
        A = torch.randn(parts["scale_A"].shape[0], self.rank, generator=draw, dtype=torch.float32)
        B = torch.randn(self.rank, parts["scale_B"].shape[1], generator=draw, dtype=torch.float32)
        A, B = (new.to(parts["codebook"].device) for new in (A / A.norm(dim=0), B / B.norm(dim=1, keepdim=True)))
        magnitude = torch.zeros_like(B[:, 0])
        A[:, : older.rank], B[: older.rank] = parts["scale_A"], parts["scale_B"]
        magnitude[: older.rank] = parts["rank_magnitude"]
        return {"codebook": parts["codebook"], "scale_A": A, "scale_B": B, "rank_magnitude": magnitude}

    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """Scales from group means, then a codebook for the weights relative to them."""
        return codebook_fit.start(weight_NOI, h_NI, self.entries, self.rank, cluster).fitted()

    def continued(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """A fitted to the rows' magnitudes, then nearest indices."""
        return codebook_fit.further(Codebooks.of(fitted), weight_NOI, h_NI).fitted()

    def alternated(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, shared: bool = True) -> Fitted:
        """Codebook, A, B and indices in turn; only A and indices where codebook and B are shared with other rows."""
        round = codebook_fit.alternate if shared else codebook_fit.alternate_rows
        return round(Codebooks.of(fitted), weight_NOI, h_NI).fitted()

    def refined(self, fitted: Fitted, weight_NOI: Tensor, cost: Curvature, shared: bool = True) -> Fitted:
        """A, B and the codebook by conjugate gradients."""
        refine = codebook_fit.refine if shared else codebook_fit.refine_rows
        return refine(Codebooks.of(fitted), weight_NOI, cost).fitted()

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, scales with their magnitudes, and the codebook."""
        return self.bits * outputs * inputs + 16 * (self.rank * (outputs + inputs) + self.entries * self.dim)

    def equations(self, outputs: int, inputs: int) -> Equations:
        """Normal equations of every row or every column, and their factors."""
        return Equations(2 * max(outputs, inputs) * self.rank**2, f"equations of rank {self.rank}", "rank")

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """A rank above the smaller side of a matrix is refused, as it adds nothing."""
        max_rank = min(outputs, inputs)
        if self.rank <= max_rank:
            return None
        return Misfit("rank", f"has {outputs} outputs and {inputs} inputs, so no rank above {max_rank} adds anything")


@dataclass(frozen=True)
class Codebook(LowRank):
    """The format `codebook`, whose entries are numbers, ascending at conversion."""

    name: ClassVar[str] = "codebook"

    def settings(self) -> dict[str, Any]:
        """Bits and rank without a name, because such files are older than the other formats."""
        return {"bits": self.bits, "rank": self.rank}

    def kernels(self, device: torch.device) -> Kernels | None:
        """Triton kernels on CUDA."""
        if device.type != "cuda":
            return None
        from qat.quant.formats import codebook_kernels

        return codebook_kernels if codebook_kernels.AVAILABLE else None

    def product(self) -> Product | None:
        """A Triton kernel."""
        from qat.quant.formats import codebook_product

        return self._product if codebook_product.AVAILABLE else None

    def _product(self, x_I: Tensor, indices: Tensor, parts: Parts) -> Tensor:
        from qat.quant.formats import codebook_product

        codebook, A, B, magnitudes = (parts[name] for name in self.parts(0, 0))
        return codebook_product.product(x_I, indices, codebook, A, magnitudes, B, self.bits)


def _norms(B: Tensor) -> Tensor:
    """Norms [N, R, 1] of B's rows."""
    return B.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _half(x: Tensor) -> Tensor:
    return x.half().float()
