import numpy as np
import pytest
import torch

from qat.errors import NumericsError
from qat.quant.backends import kmeans_pytorch
from qat.quant.kmeans import kmeans


def values(rows: int, count: int = 4000):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, count, generator=draw) * 0.02, torch.rand(rows, count, generator=draw)


def inertia(x, weight, centres) -> torch.Tensor:
    nearest = (x.double()[:, :, None] - centres.double()[:, None]).square().amin(2)
    return (weight * nearest).sum(1)


@pytest.mark.parametrize("entries", [4, 16])
def test_it_is_at_most_twice_as_far_from_the_values_as_the_optimum(entries):
    x, weight = values(2)
    found = kmeans_pytorch(x, weight, entries)
    assert found.shape == (2, entries) and found.dtype == torch.float32 and (found.diff(dim=1) >= 0).all()
    assert (inertia(x, weight, found) <= 2 * inertia(x, weight, kmeans(x, weight, entries))).all()


def test_weights_count():
    x = torch.tensor([[12.0, 1.0, 2.0, 0.0, 11.0, 10.0]])
    found = kmeans_pytorch(x, torch.tensor([[3.0, 0.0, 0.0, 1.0, 0.0, 0.0]]), 2)
    assert torch.allclose(found, torch.tensor([[0.0, 12.0]]), atol=1e-5)


def test_nothing_is_printed(capfd):
    kmeans_pytorch(*values(1), 4)
    assert capfd.readouterr() == ("", "")


def test_the_same_values_give_the_same_codebook_and_numpys_random_numbers_go_on_undisturbed():
    np.random.seed(5)
    expected = np.random.random(4)
    np.random.seed(5)
    first = kmeans_pytorch(*values(1), 4)
    drawn = np.random.random(4)
    second = kmeans_pytorch(*values(1), 4)
    assert (drawn == expected).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "row",
    [
        [0.3] * 50,
        [0.0] * 49 + [1.0],
        [0.0] * 45 + [1.0, 2.0, 3.0, 4.0, 1e6],
        [float(i % 5) for i in range(50)],
    ],
    ids=["constant", "two values", "far outlier", "five values"],
)
def test_degenerate_values_come_to_an_end(row):
    x = torch.tensor([row])
    try:
        found = kmeans_pytorch(x, torch.ones_like(x), 4)
    except NumericsError as error:
        assert "kmeans=exact" in str(error)
    else:
        assert torch.isfinite(found).all() and found.shape == (1, 4)


def test_fewer_distinct_values_than_entries_are_all_kept():
    x = torch.tensor([[2.0, 1.0] * 20])
    assert kmeans_pytorch(x, torch.ones_like(x), 4).tolist() == [[1.0, 2.0, 2.0, 2.0]]


@pytest.mark.parametrize(("x", "weight"), [([float("nan"), 1.0], [1.0, 1.0]), ([1.0, 2.0], [0.0, 0.0])])
def test_what_has_no_codebook_is_refused(x, weight):
    with pytest.raises(NumericsError):
        kmeans_pytorch(torch.tensor([x]), torch.tensor([weight]), 2)
