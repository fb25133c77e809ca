"""The head and the loss as one step: hidden states in, the loss and their gradient out.

The gradient of the logits is taken at once, back through the head, while they are there; nothing of the size of the
vocabulary outlives a chunk of positions but the gradient of a head that learns, in which all chunks are added up.
Where logits are a product (`qat.head`) with a head that does not learn, `topk_kl` needs no such chunk: it looks at
the rows of the head that belong to cached tokens, K of them a position instead of V. Other losses on cached tokens
differ from it by a multiple of the student's softmax, whose factor is the gradient of the log-sum-exp.

Shapes: P positions, D hidden, V vocabulary, K cached tokens.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.distill.loss import Loss, differentiated, full_kl
from qat.head import OutputHead

# Largest size of the fp32 logits that exist at one time, in bytes
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26, "mps": 2**28}
COPIES = 4  # copies of the logits that a model's own code after the body may keep for its gradient


class Head:
    """The student's head with a loss on top."""

    def __init__(self, student: PreTrainedModel, loss: Loss) -> None:
        """Prepares the head; a teacher that runs beside the student keeps its own head."""
        self.head, self.loss, self.device = OutputHead(student), loss, student.device
        self.beside = None if loss.teacher is None else OutputHead(loss.teacher)
        self.sparse = not loss.needs_vocabulary and self.head.weight is not None and self.head.learns is None

    @torch.no_grad()
    def backward(
        self, hidden_PD: Tensor, ids_PK: Tensor, logprobs_PK: Tensor, weight_P: Tensor, teacher_PD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the loss, and its gradient [P, D] in the type of the hidden states.

        Where the head learns, its own gradient is added up too, without being returned.

        Args:
            hidden_PD: the student's last hidden states.
            ids_PK: cached tokens, most likely first.
            logprobs_PK: the teacher's log-probabilities of these.
            weight_P: of each position, fp32; any scaling of the loss included.
            teacher_PD: the teacher's last hidden states, for `full_kl`.
        """
        total = weight_P.new_zeros(())
        grad_PD = torch.empty_like(hidden_PD)
        for part in self._chunks(len(hidden_PD)):
            batch = (hidden_PD[part], ids_PK[part], logprobs_PK[part], weight_P[part])
            if self.sparse:
                value, grad_PD[part] = self._sparse(*batch)
            else:
                value, grad_PD[part] = self._dense(*batch, None if teacher_PD is None else teacher_PD[part])
            total += value
        return total, grad_PD

    @torch.no_grad()
    def losses(self, hidden_PD: Tensor, ids_PK: Tensor, logprobs_PK: Tensor, teacher_PD: Tensor | None) -> Tensor:
        """The loss [P] of each position, fp32; arguments as of `backward`."""
        rows = [hidden_PD, ids_PK, logprobs_PK] + ([] if teacher_PD is None else [teacher_PD])
        parts = self._chunks(len(hidden_PD))
        return torch.cat([self._values(*(tensor[part] for tensor in rows)) for part in parts])

    @torch.no_grad()
    def logits(self, hidden_PD: Tensor, ids_PK: Tensor) -> Tensor:
        """The student's logits [P, K] at some tokens, fp32."""
        if self.head.weight is None:
            parts = self._chunks(len(hidden_PD))
            return torch.cat([self.head.logits(hidden_PD[part]).gather(1, ids_PK[part]) for part in parts])
        parts = self._chunks(len(hidden_PD), sparse=True)
        return torch.cat([self._gathered(hidden_PD[part], ids_PK[part]) for part in parts])

    def _values(self, hidden: Tensor, ids: Tensor, logprobs: Tensor, teacher: Tensor | None = None) -> Tensor:
        if self.sparse:
            logits = self._gathered(hidden, ids)
            return self.loss.at(logits, logits.new_zeros(len(logits)), logprobs)
        logits = self.head.logits(hidden)
        value = self.loss.at(logits.gather(1, ids), Softmax(logits).log_sum, logprobs)
        return value if teacher is None else value + self._divergence(logits, self._teacher_logits(teacher))

    def _sparse(self, hidden: Tensor, ids: Tensor, logprobs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._gathered(hidden, ids)
        none = logits.new_zeros(len(logits))
        value, d_logits, _ = differentiated(lambda z, s: self.loss.at(z, s, logprobs), weight, logits, none)
        weight_VD = cast(Tensor, self.head.weight)
        if (kernels := _kernels(hidden)) is not None:
            return value, kernels.combine_rows(weight_VD, ids, d_logits, hidden.dtype)
        return value, torch.bmm(d_logits[:, None], weight_VD[ids].float())[:, 0].to(hidden.dtype)

    def _dense(
        self, hidden: Tensor, ids: Tensor, logprobs: Tensor, weight: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits, back = self.head.differentiable(hidden)
        if teacher is not None and not self.loss.hard:
            value, grad = self._full(logits, teacher, weight, hidden.dtype)
            return value, back(grad)
        softmax = Softmax(logits)
        at_ids, log_sum = logits.gather(1, ids), softmax.log_sum
        value, d_at_ids, d_log_sum = differentiated(lambda z, s: self.loss.at(z, s, logprobs), weight, at_ids, log_sum)
        if teacher is None:
            d_at_ids += (at_ids - log_sum[:, None]).exp() * d_log_sum[:, None]
            grad = softmax.times(d_log_sum, hidden.dtype)
            grad.scatter_(1, ids, d_at_ids.to(grad.dtype))  # their sum, rounded once
            return value, back(grad)
        further, grad = self._full(logits, teacher, weight, torch.float32)
        grad += softmax.times(d_log_sum, grad.dtype)
        grad.scatter_add_(1, ids, d_at_ids)
        return value + further, back(grad)

    def _full(self, logits: Tensor, teacher: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The divergence from the teacher's whole distribution, and its gradient with respect to the logits."""
        theirs, T = self._teacher_logits(teacher), self.loss.temperature
        if (kernels := _kernels(logits)) is not None:
            kl, *sums = kernels.divergence(logits, theirs, T)
            return (kl * weight).sum() * T**2, kernels.divergence_gradient(logits, theirs, *sums, T, weight * T, dtype)
        value = (full_kl(logits, theirs, T) * weight).sum()
        return value, ((weight * T)[:, None] * ((logits / T).softmax(-1) - (theirs / T).softmax(-1))).to(dtype)

    def _divergence(self, logits: Tensor, theirs: Tensor) -> Tensor:
        T = self.loss.temperature
        if (kernels := _kernels(logits)) is not None:
            return kernels.divergence(logits, theirs, T)[0] * T**2
        return full_kl(logits, theirs, T)

    def _teacher_logits(self, teacher: Tensor) -> Tensor:
        return cast(OutputHead, self.beside).logits_beside(teacher, self.head)

    def _gathered(self, hidden: Tensor, ids: Tensor) -> Tensor:
        weight_VD = cast(Tensor, self.head.weight)
        if (kernels := _kernels(hidden)) is not None:
            return kernels.dot_rows(weight_VD, ids, hidden)
        return torch.bmm(weight_VD[ids].float(), hidden[..., None].float())[..., 0]

    def _chunks(self, positions: int, sparse: bool = False) -> Iterator[slice]:
        """Slices of positions, all of the same length except the last."""
        size = positions
        if not (sparse or self.sparse):
            held = CHUNK_BYTES[self.device.type] // (4 * self.head.vocabulary)
            size = max(1, held if self.head.weight is not None else held // COPIES)
        elif _kernels(cast(Tensor, self.head.weight)) is None:
            size = 256
        return (slice(start, start + size) for start in range(0, positions, max(size, 1)))


class Softmax:
    """The softmax of fp32 logits [P, V]: its log-sum-exp, and the softmax times a factor; each in one pass on CUDA."""

    def __init__(self, logits_PV: Tensor) -> None:
        """Computes `log_sum` [P]."""
        self._kernels, self._logits = _kernels(logits_PV), logits_PV
        if self._kernels is not None:
            self.log_sum = self._kernels.log_sum_exp(logits_PV)
            return
        # The most likely token has a share of at least 1/V, so its logarithm gives the sum precisely enough.
        self._softmax = logits_PV.softmax(-1)
        top, place = logits_PV.max(-1, keepdim=True)
        self.log_sum = (top - self._softmax.gather(1, place).log())[:, 0]

    def times(self, factor_P: Tensor, dtype: torch.dtype) -> Tensor:
        """`softmax · factor` [P, V] in the given type; to be called once."""
        if self._kernels is not None:
            return self._kernels.softmax_times(self._logits, self.log_sum, factor_P, dtype)
        return self._softmax.mul_(factor_P[:, None]).to(dtype)


def position_chunks(
    hidden: Tensor, targets: tuple[Tensor, ...], vocabulary: int, most: int = 256
) -> Iterator[tuple[Tensor, ...]]:
    """Hidden states and targets [X, …] as pieces of at most `most` positions, fewer where the vocabulary is large."""
    size = positions_at_once(hidden.device.type, vocabulary, most)
    return zip(*(tensor.split(size) for tensor in (hidden, *targets)), strict=True)


def positions_at_once(kind: str, vocabulary: int, most: int = 256) -> int:
    """Positions whose logits exist at one time on a device of that kind, where `position_chunks` cuts the text."""
    return max(1, min(most, CHUNK_BYTES[kind] // (4 * vocabulary)))


def _kernels(x: Tensor) -> Any:
    """The fused kernels on CUDA, else None."""
    if not x.is_cuda:
        return None
    from qat.distill import kernels

    return kernels if kernels.AVAILABLE else None
