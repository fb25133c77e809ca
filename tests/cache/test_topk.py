"""What is kept of logits, against float64 and a full sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.cache.topk import BLOCK, most_likely, outputs

HALF = 2.0**-11  # relative rounding of float16


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_kept_outputs_are_exact_for_any_logits(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(6, 40, generator=generator)).to(dtype)
    sample = torch.randint(40, (6, 7), generator=generator)
    kept = outputs(logits, sample, 5)
    wanted = logits.double().log_softmax(-1)
    assert torch.equal(logits.gather(-1, kept["ids"]), logits.sort(-1, descending=True).values[:, :5])
    for name, ids in (("topk_logprobs", kept["ids"]), ("random_logprobs", sample)):
        exact = wanted.gather(-1, ids)
        assert kept[name].dtype is torch.float16
        assert ((kept[name].double() - exact).abs() <= HALF * exact.abs() + 1e-5).all()


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, BLOCK - 1), st.sampled_from([3, 100_000]))
def test_most_likely_is_a_full_sort(seed, top_k, behind, values):
    """Few different values make ties, whose ids may differ but must have the value."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (3, 30 * BLOCK + behind), generator=generator).float()
    top, ids = most_likely(logits, top_k)
    assert torch.equal(top, logits.sort(-1, descending=True).values[:, :top_k])
    assert torch.equal(logits.gather(-1, ids), top)
    assert all(len(row.unique()) == top_k for row in ids)


@pytest.mark.parametrize("place", [0, BLOCK, 30 * BLOCK + 5])
def test_most_likely_finds_a_peak_anywhere(place):
    logits = torch.zeros(1, 30 * BLOCK + 6)
    logits[0, place] = 1
    assert most_likely(logits, 4)[1][0, 0] == place
