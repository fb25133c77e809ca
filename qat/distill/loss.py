"""Losses: the distance of the student from the teacher at each position.

All take logits in fp32 and give KL(teacher‖student) in nats. V is the vocabulary, K the cached top-k.

- `topk_kl` renormalises both sides over the cached tokens: the run log's own measure. It cannot see
  probability that the student leaks outside of them.
- `bucket_kl` adds one bucket for all other tokens, so that leaked mass costs.
- `full_kl` compares whole distributions and needs the teacher's logits.
- `sft` has no teacher: it is the cross-entropy of the tokens that answers have, as in supervised fine-tuning.

Losses on cached tokens see the student as its logits at these tokens and the log-sum-exp over its
vocabulary; `qat.distill.head` turns gradients of the two into one of the hidden state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.config import LossKind

KD_TEMPERATURE = 2.0  # temperature of `kd_loss` in the run log


def topk_kl(logits_K: Tensor, topk_logprobs_K: Tensor, temperature: float) -> Tensor:
    """KL over the top-k at `temperature`, times its square (Hinton et al. 2015, section 2).

    Args:
        logits_K: [..., K] of the student, at the cached tokens.
        topk_logprobs_K: [..., K] of the teacher; only their differences matter.
        temperature: divides both sides.

    Returns:
        [...] nats.
    """
    teacher = (topk_logprobs_K / temperature).log_softmax(-1)
    student = (logits_K / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def bucket_kl(logits_K: Tensor, log_sum: Tensor, topk_logprobs_K: Tensor) -> Tensor:
    """KL over the top-k and one bucket for the rest, at T = 1: the cached log-probabilities give the rest only there.

    Args:
        logits_K: [..., K] of the student, at the cached tokens.
        log_sum: [...], log-sum-exp of all of the student's logits.
        topk_logprobs_K: [..., K] log-probabilities of the teacher's full softmax.
    """
    student_K = logits_K - log_sum[..., None]
    inside = (topk_logprobs_K.exp() * (topk_logprobs_K - student_K)).sum(-1)
    teacher_rest, student_rest = rest(topk_logprobs_K), rest(student_K)
    return inside + teacher_rest * (teacher_rest.log() - student_rest.log())


def rest(logprobs_K: Tensor) -> Tensor:
    """Probability outside of the given tokens [...], at least 1e-6: fp16 and rounding cannot resolve less."""
    return (1 - logprobs_K.exp().sum(-1)).clamp_min(1e-6)


def full_kl(logits_V: Tensor, teacher_logits_V: Tensor, temperature: float = 1.0) -> Tensor:
    """KL over the whole vocabulary at `temperature`, times its square."""
    teacher = (teacher_logits_V / temperature).log_softmax(-1)
    student = (logits_V / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


@dataclass(frozen=True)
class Loss:
    """A configured loss.

    Attributes:
        kind: of the divergence.
        temperature: divides the logits of both models.
        hard: weight of the cross-entropy on the teacher's first choice, which is added.
        teacher: runs beside the student, for `full_kl` alone. `sft` has neither a teacher nor a hard part.
    """

    kind: LossKind
    temperature: float = 1.0
    hard: float = 0.0
    teacher: PreTrainedModel | None = None

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L-1, K], their log-probabilities [B, L-1, K] fp32, and where positions count, [B, L-1] bool.

        Of answers the only token is the next one, and it is certain.
        """
        if not self.kind.needs_answers:
            return batch.topk_ids, batch.topk_logprobs, batch.loss_mask
        ids = batch.input_ids[:, 1:, None]
        return ids, torch.zeros(ids.shape, dtype=torch.float32, device=ids.device), batch.answers

    @property
    def needs_vocabulary(self) -> bool:
        """False where the loss only needs the student's logits at the cached tokens."""
        return self.kind is not LossKind.topk_kl or self.hard > 0

    def at(self, logits_K: Tensor, log_sum: Tensor, topk_logprobs_K: Tensor) -> Tensor:
        """The loss of each position from the cached tokens [..., K], most likely first; for `full_kl` the hard term."""
        surprise = log_sum - logits_K[..., 0]
        if self.kind.needs_answers:
            return surprise
        hard = self.hard * surprise
        if self.kind.needs_teacher:
            return hard
        if self.kind is LossKind.bucket_kl:
            return bucket_kl(logits_K, log_sum, topk_logprobs_K) + hard
        return topk_kl(logits_K, topk_logprobs_K, self.temperature) + hard


def differentiated(function: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The weighted sum of a loss over positions, then its gradient for each floating-point input.

    Args:
        function: gives a loss [...] of `inputs`.
        weight: [...] of each position.
        inputs: small tensors, differentiated alone.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        total = (function(*leaves) * weight).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), *(x.new_zeros(x.shape) if g is None else g for g, x in zip(grads, leaves, strict=True))
