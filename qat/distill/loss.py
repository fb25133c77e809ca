"""How far the student is from the teacher, for each position.

All take logits in fp32 and give KL(teacher‖student) in nats. V is the vocabulary, K the cached top-k.

- `topk_kl` renormalises both sides over the cached tokens: the run log's own measure. It cannot see
  probability that the student leaks outside of them.
- `bucket_kl` adds one bucket for all other tokens, so that leaked mass costs.
- `full_kl` compares whole distributions and needs the teacher's logits.
"""

from torch import Tensor

KD_TEMPERATURE = 2.0  # of `kd_loss` in the run log


def topk_kl(logits_V: Tensor, topk_ids_K: Tensor, topk_logprobs_K: Tensor, temperature: float) -> Tensor:
    """KL over the top-k at `temperature`, times its square (Hinton et al. 2015, section 2).

    Args:
        logits_V: [..., V] of the student.
        topk_ids_K: [..., K] int64.
        topk_logprobs_K: [..., K] of the teacher; only their differences matter.
        temperature: divides both sides.

    Returns:
        [...] nats.
    """
    teacher = (topk_logprobs_K / temperature).log_softmax(-1)
    student = (logits_V.gather(-1, topk_ids_K) / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def bucket_kl(logits_V: Tensor, topk_ids_K: Tensor, topk_logprobs_K: Tensor) -> Tensor:
    """KL over the top-k and one bucket for the rest, at T = 1: the cache knows the tail's mass at T = 1 only.

    Shapes as in `topk_kl`; `topk_logprobs_K` are log-probabilities of the full softmax.
    """
    student_K = logits_V.gather(-1, topk_ids_K) - logits_V.logsumexp(-1, keepdim=True)
    inside = (topk_logprobs_K.exp() * (topk_logprobs_K - student_K)).sum(-1)
    teacher_rest, student_rest = rest(topk_logprobs_K), rest(student_K)
    return inside + teacher_rest * (teacher_rest.log() - student_rest.log())


def rest(logprobs_K: Tensor) -> Tensor:
    """Probability outside the given tokens [...], never below 1e-6: fp16 and rounding end there."""
    return (1 - logprobs_K.exp().sum(-1)).clamp_min(1e-6)


def full_kl(logits_V: Tensor, teacher_logits_V: Tensor, temperature: float = 1.0) -> Tensor:
    """KL over the whole vocabulary at `temperature`, times its square."""
    teacher = (teacher_logits_V / temperature).log_softmax(-1)
    student = (logits_V / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2
