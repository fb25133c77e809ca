"""How far a student is from its teacher, on text that training never saw.

`kl` is KL(teacher‖student) over the whole vocabulary at T = 1, the teacher running beside the student;
`kd_loss` is the run log's measure, over the teacher's top-k at T = 2, times 4; `perplexity` is of the text
itself; `top1_agreement` is the share of positions where both prefer the same token.

Shapes: N rows, F figures, X positions that count, V vocabulary, D hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.console import progress
from qat.distill.head import position_chunks
from qat.distill.loss import KD_TEMPERATURE, full_kl, topk_kl
from qat.errors import NumericsError
from qat.evaluate.intervals import interval
from qat.evaluate.positions import Positions
from qat.head import OutputHead
from qat.machine import Machine
from qat.models.streamed import each_hidden, stream_of
from qat.quant.linear import baked

TOKENS_AT_ONCE = 8192  # of a batch: 128 rows of 64, 4 of 2,048
TOGETHER = 1 << 15  # tokens of a text that go through one decoder layer before the next one is read


class Rows(Protocol):
    """Rows of tokens that are read in batches: a split of a cache, plain text, windows of a long one."""

    rows: int
    meta: dict[str, Any]

    def batch(self, rows: Tensor) -> Batch:
        """The rows with these numbers."""

    def in_order(self, size: int) -> list[Tensor]:
        """All row numbers, at most `size` at a time."""


@dataclass(frozen=True)
class Metrics:
    """Means over all positions that count."""

    kl: float
    kd_loss: float
    perplexity: float
    teacher_perplexity: float
    top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """What was found at the positions of each row.

    Attributes:
        sums_NF: float64 sums over a row's positions in the order of `Metrics`, negative log-likelihoods
            for perplexities.
        counts_N: positions of each row that count.
        positions: where in its document KL was found; None for a teacher beside itself.
    """

    sums_NF: Tensor
    counts_N: Tensor
    positions: Positions | None = None

    def metrics(self) -> Metrics:
        """The figures of all rows together."""
        return _metrics(self.sums_NF.sum(0) / self.counts_N.sum())

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each figure that resampled rows make plausible."""
        low, high = (asdict(_metrics(end)) for end in interval(self.sums_NF, self.counts_N))
        return {name: (low[name], high[name]) for name in low}

    def of_teacher(self) -> "Comparison":
        """The teacher beside itself on the same rows."""
        sums = self.sums_NF.clone()
        sums[:, :2], sums[:, 2], sums[:, 4] = 0, sums[:, 3], self.counts_N
        return Comparison(sums, self.counts_N)


def _metrics(means_F: Tensor) -> Metrics:
    kl, kd, nll, teacher_nll, same = means_F.tolist()
    return Metrics(kl, kd, _exp(nll), _exp(teacher_nll), same)


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # exp of more than about 709 overflows a float


def evaluate(
    student: PreTrainedModel, teacher: PreTrainedModel, held_out: Rows, top_k: int, machine: Machine
) -> Metrics:
    """The figures of `compare` over all rows together."""
    return compare(student, teacher, held_out, top_k, machine).metrics()


@torch.inference_mode()
def compare(
    student: PreTrainedModel, teacher: PreTrainedModel, held_out: Rows, top_k: int, machine: Machine
) -> Comparison:
    """Compares two models at all positions that count.

    Args:
        student: any of its quantized weights is computed once; may be the teacher itself.
        teacher: the model it imitates.
        held_out: text that training never saw.
        top_k: tokens that `kd_loss` looks at, those the teacher finds likeliest.
        machine: compute type and micro-batch.

    Raises:
        NumericsError: a figure is not finite, or no position counts.
    """
    tokens, positions = held_out.rows * _length(held_out), Positions(held_out.rows, _length(held_out))
    sums_NF = torch.zeros(held_out.rows, 5, dtype=torch.float64)
    found = Comparison(sums_NF, torch.zeros(held_out.rows, dtype=torch.long), positions)
    with baked(student, machine.dtype), progress("evaluation", tokens, "tokens") as advance:
        for rows, batch, ours, theirs in _states(student, teacher, held_out, machine):
            for row_X, place_X, values_FX in _values_of(student, teacher, batch, ours, theirs, top_k):
                sums_NF.index_add_(0, rows[row_X], values_FX.mT)
                positions.add(rows[row_X], place_X, values_FX[0])
            found.counts_N[rows] = batch.loss_mask.sum(1).cpu()
            advance(batch.input_ids.numel())
    if not found.counts_N.any():
        raise NumericsError("no position of the text that is measured counts, so nothing can be said of a model")
    metrics = found.metrics()
    if not found.sums_NF.isfinite().all():
        raise NumericsError(
            f"evaluation gave kl {metrics.kl}, kd_loss {metrics.kd_loss}, perplexity {metrics.perplexity}:"
            " the checkpoint holds NaN or infinity"
        )
    return found


def rows_at_once(length: int, machine: Machine) -> int:
    """Rows of so many tokens that two models are compared on together."""
    return max(1, min(machine.micro_batch, TOKENS_AT_ONCE // length))


def _length(held_out: Rows) -> int:
    return int(held_out.meta["length"])


def _states(
    student: PreTrainedModel, teacher: PreTrainedModel, held_out: Rows, machine: Machine
) -> Iterator[tuple[Tensor, Batch, Tensor, Tensor]]:
    """Numbers of rows, the batch of them, and last hidden states [P, D] of both models there, batch by batch.

    Models whose decoder layers lie in files take many batches at a time, so that a layer is read once for these.
    """
    at_once = rows_at_once(_length(held_out), machine)
    order = held_out.in_order(at_once)
    in_files = stream_of(student) is not None or stream_of(teacher) is not None
    together = max(1, TOGETHER // (at_once * _length(held_out))) if in_files else 1
    for start in range(0, len(order), together):
        some = order[start : start + together]
        batches = [held_out.batch(rows).to(machine.device) for rows in some]
        text = [batch.inputs() for batch in batches]
        theirs = each_hidden(teacher, text)
        ours = repeat(None) if student is teacher else each_hidden(student, text)
        for rows, batch, given, own in zip(some, batches, theirs, ours, strict=False):
            yield rows, batch, given if own is None else own, given


def _values_of(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, ours: Tensor, theirs: Tensor, top_k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows in the batch [X], places in their documents [X] and float64 figures [F, X], on the CPU, some at a time."""
    counts = batch.loss_mask
    theirs, ours = theirs[counts.flatten()], ours[counts.flatten()]
    head, teacher_head = OutputHead(student), OutputHead(teacher)
    targets = (theirs, batch.input_ids[:, 1:][counts], counts.nonzero()[:, 0], _places(batch)[counts])
    for ours_XD, theirs_XD, next_X, row_X, place_X in position_chunks(ours, targets, head.vocabulary):
        logits_XV, teacher_XV = head.logits(ours_XD), teacher_head.logits_beside(theirs_XD, head)
        yield row_X.cpu(), place_X.cpu(), _values(logits_XV, teacher_XV, next_X, top_k).cpu().double()


def _places(batch: Batch) -> Tensor:
    """Where each token that predicts one lies in its document [B, L-1]."""
    ids_BL = batch.input_ids
    counted = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    return batch.inputs().get("position_ids", counted)[:, :-1]


def _values(logits_XV: Tensor, teacher_XV: Tensor, next_X: Tensor, top_k: int) -> Tensor:
    """Figures [F, X] in the order of `Metrics`, negative log-likelihoods for perplexities."""
    top, ids = teacher_XV.topk(top_k, dim=-1)
    values = (
        full_kl(logits_XV, teacher_XV),
        topk_kl(logits_XV.gather(-1, ids), top, KD_TEMPERATURE),
        torch.nn.functional.cross_entropy(logits_XV, next_X, reduction="none"),
        torch.nn.functional.cross_entropy(teacher_XV, next_X, reduction="none"),
        (logits_XV.argmax(-1) == teacher_XV.argmax(-1)).float(),
    )
    return torch.stack(values)
