"""Codebooks of vectors: adjacent weights of a row share an index into a learned codebook, times a low-rank scale.

`W[o, Dj:Dj+D] = codebook[index[o, j]] ⊙ S[o, Dj:Dj+D]` with `S = (A·g) @ B`. At equal bits the entries of a vector fit
what weights have in common that numbers by themselves cannot: they lie in a ball instead of a cube, and densely where
weights do (the gain of vector quantization; Gersho & Gray 1992; as a format for language models: van Baalen et
al. 2024, "GPTVQ", arXiv 2402.15319, and Egiazarian et al. 2024, "AQLM", arXiv 2401.06118).

Shapes: N layers, O outputs, I inputs, K = 2^(bits · D) entries, D numbers of each, J = I / D indices of a row.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant import vector_kmeans
from qat.quant.formats.base import Cluster, Fitted, Kernels, Misfit
from qat.quant.formats.codebook import LowRank

DIMS = (2, 4, 8)
MAX_BITS = 12  # of an index: 4096 entries


@dataclass(frozen=True)
class Vector(LowRank):
    """The format `vector`.

    Attributes:
        dim: D, 2, 4 or 8; bits times dim is at most 12.
    """

    dim: int = 4

    name: ClassVar[str] = "vector"

    def settings(self) -> dict[str, Any]:
        """Name, bits, dim and rank."""
        return {"format": self.name, "bits": self.bits, "dim": self.dim, "rank": self.rank}

    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """As for numbers, with k-means of its own, as `cluster` makes numbers."""
        return super().start(weight_NOI, h_NI, partial(vector_kmeans.kmeans, dim=self.dim))

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """Why there is no such codebook, rows do not consist of whole vectors, or the rank adds nothing."""
        if self.dim not in DIMS:
            return Misfit("dim", f"could have vectors of {', '.join(map(str, DIMS))} weights")
        if self.bits * self.dim > MAX_BITS:
            highest = MAX_BITS // self.dim
            return Misfit("bits", f"could have vectors of {self.dim} weights at {highest} bits at most: 4096 entries")
        if inputs % self.dim:
            return Misfit("dim", f"has rows of {inputs} weights, which vectors of {self.dim} do not divide")
        return super().misfit(outputs, inputs)

    def kernels(self, device: torch.device) -> Kernels | None:
        """Triton kernels on CUDA."""
        if device.type != "cuda":
            return None
        from qat.quant.formats import vector_kernels

        return vector_kernels if vector_kernels.AVAILABLE else None
