"""Drawing in two steps is drawing from the distribution."""

import pytest
import torch

from qat.generation.sampling import BLOCK, choose


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 3 * BLOCK + 11])
def test_draws_follow_the_distribution(vocabulary):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=draw) * 2
    logits[3] = -torch.inf
    p = (logits.double() / 0.7).softmax(0)
    draws = 40_000
    counts = choose(logits.repeat(draws, 1), torch.rand(draws, generator=draw), 0.7).bincount(minlength=vocabulary)
    assert counts[3] == 0
    common = p * draws >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = draws * torch.cat([p[common], p[~common].sum()[None]]).clamp_min(1e-9)
    chi_square, degrees = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert chi_square < degrees + 3.5 * (2 * degrees) ** 0.5


def test_a_number_finds_the_token_whose_part_of_the_distribution_it_is_in():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)) * 3
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(2))
    exact = (logits.double() / 1.3).softmax(1).cumsum(1)
    expected = torch.searchsorted(exact, uniform[:, None].double(), right=True)[:, 0]
    assert (choose(logits, uniform, 1.3) == expected).sum() >= 49  # rounding may move one that lies on an edge


def test_the_ends_of_the_distribution_are_possible_tokens():
    logits = torch.full((2, 2 * BLOCK), -torch.inf)
    logits[:, [5, BLOCK + 7]] = torch.tensor([0.0, 1.0])
    assert choose(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0).tolist() == [5, BLOCK + 7]


def test_a_negative_number_takes_the_most_likely_token():
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(3))
    best = logits.argmax(1)
    assert torch.equal(choose(logits, torch.full((4,), -1.0), 1.0), best)
    mixed = choose(logits, torch.tensor([-1.0, 0.0, -1.0, 0.0]), 1.0)
    assert torch.equal(mixed[::2], best[::2]) and mixed[1::2].tolist() == [0, 0]
