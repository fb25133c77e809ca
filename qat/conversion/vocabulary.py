"""What errors in embedding and head cost, and the fit of matrices of so many rows that they are taken in pieces.

To second order an error E in a matrix of vocabulary × hidden adds `Σ_v E_v (ρ_v H + φ_v Γ) E_vᵀ` to the KL from the
model. As the head: H is the second moment of the final hidden states, and ρ_v the mean of p_v (1 − p_v), which is
how much the softmax bends along logit v. As the embedding: φ_v is how often token v occurs, and Γ the second moment
of the loss's gradient at the rows of tokens, or without gradients as much in every direction, and as much in all as
the head's part. ρ and φ are nearly proportional, so rows share one matrix, each with the weight of its traces.

Shapes: V tokens, D hidden, P positions.
"""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.config import ConvertConfig
from qat.conversion.products import add_square, mirrored
from qat.quant.architectures import Layer
from qat.quant.curvature import Curvature, Factor
from qat.quant.embedding import ends
from qat.quant.fit import Problem, fit, improve
from qat.quant.formats import Cluster, Fitted, Format
from qat.quant.vocabulary import ROLES

COPIES = 12  # fp32 copies of a weight that exist during a fit
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3  # limits of a row's weight, relative to the mean: rare tokens still count a little


class Watch:
    """Sums over a text of what embedding and head need, if they are to be quantized.

    Attributes:
        embed, head: which of both jobs is looked at.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        self._names = {one.role: one.name for one in layers if one.role in ROLES}
        self._tied = bool(self._names) and ends(model).tied
        self.embed = "embed" in self._names
        self.head = "head" in self._names or (self.embed and self._tied)
        self._width = next((one.shape[1] for one in layers if one.role in ROLES), 0)
        self._sums: dict[str, Tensor] = {}
        self._positions = 0

    def text(self, model: PreTrainedModel, batch: Batch) -> None:
        """Counts the tokens of a batch."""
        if self.embed:
            tokens = int(model.config.get_text_config().vocab_size)
            self._add("counts", torch.bincount(batch.input_ids.flatten().cpu(), minlength=tokens).float())

    def states(self, hidden_PD: Tensor, p_PV: Tensor) -> None:
        """Adds final hidden states, and the model's distributions at them."""
        if self.head:
            self._add("bends", p_PV.sum(0) - torch.linalg.vector_norm(p_PV, dim=0).square())
            self._square("states", hidden_PD)
            self._positions += len(hidden_PD)

    def slopes(self, grad_XD: Tensor, rows_XD: Tensor) -> None:
        """Adds the loss's gradients at rows of tokens; leaves out zero rows, where a norm's gradient is unbounded."""
        self._square("slopes", grad_XD * rows_XD.any(1, keepdim=True))

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the second moment [D, D] shared by all rows, and the weight [V] of each row, fp32 in host memory.

        Their product is, by row and column, what the loss's second derivative at a position is on average.
        """
        head = self._of_head() if self.head else None
        embed = self._of_embedding(head) if self.embed else None
        if self._tied:
            head, embed = None, joined([job for job in (head, embed) if job is not None]) if self.embed else None
        return {self._names[role]: joined([job]) for role, job in (("embed", embed), ("head", head)) if job is not None}

    def _of_head(self) -> "Job":
        return mirrored(self._sums["states"]) / self._positions, self._sums["bends"] / self._positions

    def _of_embedding(self, head: "Job | None") -> "Job":
        counts = self._sums["counts"]
        shares = counts / counts.sum()
        if "slopes" in self._sums:
            return mirrored(self._sums["slopes"]) / counts.sum(), shares
        width = self._width
        as_much = 1.0 if head is None else float(head[0].trace() * head[1].sum())
        return torch.eye(width, dtype=torch.float32) * as_much / width, shares

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _square(self, name: str, x_PD: Tensor) -> None:
        if name not in self._sums:
            width = x_PD.shape[1]
            self._sums[name] = torch.zeros(width, width, dtype=torch.float32, device=x_PD.device)
        add_square(self._sums[name], x_PD)


Job = tuple[Tensor, Tensor]  # the second moment [D, D] shared by all rows, and the weight [V] of each row


def joined(jobs: list[Job]) -> Job:
    """Several jobs joined into one, weighted by their traces."""
    traces = [float(matrix.trace()) for matrix, _ in jobs]
    whole = sum(float(row.sum()) * trace for (_, row), trace in zip(jobs, traces, strict=True))
    matrix = torch.stack([matrix.cpu() * row.sum().cpu() for matrix, row in jobs]).sum(0) / max(whole, 1e-30)
    return matrix, torch.stack([row.cpu() * trace for (_, row), trace in zip(jobs, traces, strict=True)]).sum(0)


def quantize(
    layer: Layer,
    weight_VD: Tensor,
    moments: Job,
    before: Fitted | None,
    cluster: Cluster,
    settings: ConvertConfig,
    max_bytes: float,
) -> tuple[Fitted, dict[str, float]]:
    """Fits a matrix, or improves on the fit of the pass before; returns the fit with its errors and seconds.

    What all rows share (a codebook, the columns' scales) is fitted to evenly many rows of every weight, as many as
    there is room for; then the rows follow, some at a time. A matrix for which there is room is fitted at once.

    Args:
        layer: its format.
        weight_VD: fp32.
        moments: the rows' matrix and weights.
        before: what is improved on, one layer.
        cluster: makes the first codebook.
        settings: rounds and sweeps.
        max_bytes: of work space.
    """
    began = time.monotonic()
    matrix, row_V = (part.to(weight_VD.device) for part in moments)
    pieces = Pieces(layer.format, weight_VD, matrix, row_V / row_V.mean().clamp_min(1e-30), cluster, settings)
    size = max(1, int(max_bytes // (COPIES * 4 * weight_VD.shape[1])))
    made = pieces.whole(before) if size >= len(weight_VD) else pieces.several(size, before)
    return made, pieces.errors(made, size) | {"seconds": time.monotonic() - began}


class Pieces:
    """A matrix whose rows are fitted all at once or some at a time."""

    def __init__(
        self,
        format: Format,
        weight_VD: Tensor,
        matrix_DD: Tensor,
        row_V: Tensor,
        cluster: Cluster,
        settings: ConvertConfig,
    ) -> None:
        """Prepares the fit; the mean of `row_V` is 1."""
        self.format, self.weight, self.matrix = format, weight_VD, matrix_DD[None]
        self.row, self.factor = row_V.clamp(MIN_WEIGHT, MAX_WEIGHT), Factor.of(self.matrix, format.dim)
        self.cluster, self.settings = cluster, settings

    def whole(self, before: Fitted | None) -> Fitted:
        """Fits all rows at once."""
        return self._fitted(slice(None), before, None)

    def several(self, size: int, before: Fitted | None) -> Fitted:
        """Fits at most `size` rows at a time."""
        known = before
        if before is None:
            order = self.row.argsort(descending=True)
            known = self._fitted(order[:: -(-len(order) // size)], None, None)
        parts = []
        for start in range(0, len(self.weight), size):
            rows = slice(start, start + size)
            parts.append(self._fitted(rows, None if before is None else self._cut(before, rows), known))
        return self._put_together(parts)

    def errors(self, made: Fitted, size: int) -> dict[str, float]:
        """Squared error of the weight, and the cost of that error, relative to those of the weight itself."""
        sums, cost = torch.zeros(4, dtype=torch.float64), Curvature(self.matrix)
        for start in range(0, len(self.weight), size):
            rows = slice(start, start + size)
            part, weight, by = self._cut(made, rows), self.weight[None, rows], self.row[rows].sqrt()[:, None]
            away = self.format.grid(part.operands).at(part.index_NOI) - weight
            found = [away.square().sum(), weight.square().sum(), cost.cost(away * by)[0], cost.cost(weight * by)[0]]
            sums += torch.stack(found).cpu().double()
        apart, whole, dear, all_of_it = sums.tolist()
        return {"weight_error": apart / max(whole, 1e-30), "output_error": dear / max(all_of_it, 1e-30)}

    def _fitted(self, rows: "slice | Tensor", before: Fitted | None, known: Fitted | None) -> Fitted:
        problem = Problem(self.weight[None, rows], self.matrix, self.factor, matters_NO=self.row[None, rows])
        if before is not None:
            return improve(problem, self.format, before, self.settings.sweeps, known is None)
        return fit(problem, self.format, self.cluster, self.settings.rounds, self.settings.sweeps, known)

    def _cut(self, whole: Fitted, rows: slice) -> Fitted:
        rowwise = {name: whole.operands[name][:, rows] for name in self.format.rowwise}
        return Fitted(whole.index_NOI[:, rows], whole.operands | rowwise)

    def _put_together(self, parts: list[Fitted]) -> Fitted:
        rowwise = {name: torch.cat([part.operands[name] for part in parts], 1) for name in self.format.rowwise}
        return Fitted(torch.cat([part.index_NOI for part in parts], 1), parts[0].operands | rowwise)
