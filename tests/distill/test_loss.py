import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.distill import loss as losses
from qat.distill.loss import full_kl, rest

VOCABULARY = 11


def outputs(seed=0, top_k=4, positions=3, spread=2.0):
    """Student logits, teacher logits, and what a cache would keep of the latter."""
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(2, positions, VOCABULARY, generator=draw) * spread
    teacher = torch.randn(2, positions, VOCABULARY, generator=draw) * spread
    logprobs, ids = teacher.log_softmax(-1).topk(top_k, dim=-1)
    return student, teacher, ids, logprobs


def topk_kl(logits, ids, logprobs, temperature):
    return losses.topk_kl(logits.gather(-1, ids), logprobs, temperature)


def bucket_kl(logits, ids, logprobs):
    return losses.bucket_kl(logits.gather(-1, ids), logits.logsumexp(-1), logprobs)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def each(function, *tensors: torch.Tensor) -> torch.Tensor:
    """A definition for one position, at every position, in float64."""
    flat = [t.double().flatten(0, 1).numpy() if t.is_floating_point() else t.flatten(0, 1).numpy() for t in tensors]
    return torch.tensor([function(*row) for row in zip(*flat, strict=True)], dtype=torch.double).unflatten(
        0, tensors[0].shape[:2]
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_topk_kl_is_the_divergence_of_renormalised_tops(temperature):
    student, _, ids, logprobs = outputs()

    def definition(s, i, t):
        return temperature**2 * divergence(softmax(t / temperature), softmax(s[i] / temperature))

    expected = each(definition, student, ids, logprobs)
    assert torch.allclose(topk_kl(student, ids, logprobs, temperature).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_full_kl_is_the_divergence_of_whole_distributions(temperature):
    student, teacher, _, _ = outputs()

    def definition(s, t):
        return temperature**2 * divergence(softmax(t / temperature), softmax(s / temperature))

    expected = each(definition, student, teacher)
    assert torch.allclose(full_kl(student, teacher, temperature).double(), expected, rtol=1e-4, atol=1e-6)


def test_bucket_kl_is_the_divergence_with_all_other_tokens_as_one():
    student, teacher, ids, logprobs = outputs()

    def definition(s, t, i):
        p, q = softmax(t), softmax(s)
        lumped = [np.append(x[i], np.delete(x, i).sum()) for x in (p, q)]
        return divergence(*lumped)

    expected = each(definition, student, teacher, ids)
    assert torch.allclose(bucket_kl(student, ids, logprobs).double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, VOCABULARY - 1))
def test_a_bucket_hides_something_of_the_whole_divergence_and_never_adds(seed, top_k):
    student, teacher, ids, logprobs = outputs(seed, top_k)
    whole, lumped = full_kl(student, teacher), bucket_kl(student, ids, logprobs)
    assert (lumped >= -1e-5).all() and (lumped <= whole + 1e-5).all()
    if top_k == VOCABULARY - 1:  # the bucket holds one token
        assert torch.allclose(lumped, whole, rtol=1e-3, atol=2e-5)


def test_with_every_token_cached_the_top_is_the_whole():
    student, teacher, ids, logprobs = outputs(top_k=VOCABULARY)
    for temperature in (1.0, 2.0):
        whole = full_kl(student, teacher, temperature)
        assert torch.allclose(topk_kl(student, ids, logprobs, temperature), whole, rtol=1e-4, atol=1e-6)


def test_only_the_bucket_sees_mass_that_leaks_out_of_the_top():
    _, teacher, ids, logprobs = outputs()
    leaking = teacher.clone()
    leaking.scatter_(-1, ids, leaking.gather(-1, ids) - 3)  # the same ratios within the top, less of it
    assert torch.allclose(topk_kl(leaking, ids, logprobs, 1.0), torch.zeros(2, 3), atol=1e-5)
    assert (bucket_kl(leaking, ids, logprobs) > 0.5).all()


def plain(kind: str, logits, teacher, ids, logprobs):
    """The loss spelled out in probabilities, for float64 autograd."""
    if kind == "full":
        p, q = teacher.softmax(-1), logits.softmax(-1)
    elif kind == "topk":
        p, q = (logprobs / 2).softmax(-1), (logits.gather(-1, ids) / 2).softmax(-1)
        return 4 * (p * (p / q).log()).sum(-1)
    else:
        p, q = logprobs.exp(), logits.softmax(-1).gather(-1, ids)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("kind", ["full", "topk", "bucket"])
def test_gradients_are_those_of_the_plain_definition(kind):
    student, teacher, ids, logprobs = outputs()
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    if kind == "full":
        loss = full_kl(ours, teacher)
    else:
        loss = topk_kl(ours, ids, logprobs, 2.0) if kind == "topk" else bucket_kl(ours, ids, logprobs)
    loss.sum().backward()
    plain(kind, theirs, teacher.double(), ids, logprobs.double()).sum().backward()
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_a_student_like_the_teacher_costs_nothing_and_certainty_gives_no_nan(spread):
    student, teacher, ids, logprobs = outputs(spread=spread)
    student.requires_grad_()
    for loss in (full_kl(student, teacher), topk_kl(student, ids, logprobs, 2.0), bucket_kl(student, ids, logprobs)):
        assert torch.isfinite(loss).all()
        assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()
    same = teacher.detach()
    for loss in (full_kl(same, teacher), topk_kl(same, ids, logprobs, 2.0), bucket_kl(same, ids, logprobs)):
        assert torch.allclose(loss, torch.zeros(2, 3), atol=1e-4)


def test_the_rest_is_never_less_than_a_millionth():
    assert rest(torch.tensor([0.5, 0.25]).log()) == pytest.approx(0.25)
    assert rest(torch.tensor([0.75, 0.2505]).log()) == pytest.approx(1e-6)
