from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import NumericsError
from qat.quant.kmeans import EDGES, EXACT, _longer_at_once, kmeans
from qat.quant.lookup import nearest


@pytest.fixture(autouse=True, scope="module")
def fine():
    """Boundaries are sought among as many places as anywhere but in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.quant.kmeans.MAX_EDGES", 16 * EDGES)
        yield


def inertia(x, weight, centres) -> float:
    """Weighted squared distance to the nearest centre."""
    distance = np.abs(np.asarray(x, float)[:, None] - np.asarray(centres, float)).min(axis=1)
    return float((weight * distance**2).sum())


def brute_force(x, weight, entries) -> float:
    """Least inertia over every way to cut the sorted values into at most `entries` pieces."""
    order = np.argsort(x)
    x, weight = x[order], weight[order]
    best = np.inf
    for cuts in combinations(range(1, len(x)), min(entries, len(x)) - 1):
        total = 0.0
        for start, stop in zip((0, *cuts), (*cuts, len(x)), strict=True):
            mass = weight[start:stop]
            if mass.sum() > 0:
                centre = np.average(x[start:stop], weights=mass)
                total += (mass * (x[start:stop] - centre) ** 2).sum()
        best = min(best, total)
    return best


def least_inertia(x, weight, entries) -> float:
    """The optimum for many values: cuts never cross as values are added, so each is sought between its neighbours'."""
    order = np.argsort(x)
    x, weight = x[order] - x.mean(), weight[order]
    W, S, Q = (np.concatenate([[0.0], np.cumsum(weight * x**p)]) for p in range(3))

    def spread(i, j):
        mass = np.maximum(W[j] - W[i], 1e-300)
        return np.maximum(Q[j] - Q[i] - (S[j] - S[i]) ** 2 / mass, 0)

    cost = spread(0, np.arange(len(x) + 1))
    for _ in range(entries - 1):
        better = np.empty_like(cost)
        low, high, first, last = (np.array([v]) for v in (0, len(x), 0, len(x)))
        while len(low):
            middle = (low + high) // 2
            count = np.minimum(last, middle) - first + 1
            begins = np.cumsum(count) - count
            i = np.arange(count.sum()) - np.repeat(begins - first, count)
            value = cost[i] + spread(i, np.repeat(middle, count))
            better[middle] = np.minimum.reduceat(value, begins)
            hits = np.flatnonzero(value == np.repeat(better[middle], count))
            owner, place = np.unique(np.repeat(np.arange(len(low)), count)[hits], return_index=True)
            assert len(owner) == len(low)
            cut = i[hits[place]]
            low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
            first, last = np.concatenate([first, cut]), np.concatenate([cut, last])
            keep = low <= high
            low, high, first, last = low[keep], high[keep], first[keep], last[keep]
        cost = better
    return float(cost[-1])


small = st.lists(
    st.tuples(st.integers(-20, 20).map(lambda i: i / 8), st.sampled_from([0.0, 0.25, 1.0, 3.0])), min_size=1, max_size=9
).filter(lambda pairs: sum(w for _, w in pairs) > 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small, st.integers(1, 4))
def test_small_inputs_get_the_best_of_all_partitions(pairs, entries):
    x, weight = np.array(pairs).T
    found = kmeans(torch.tensor(x)[None], torch.tensor(weight)[None], entries)[0].numpy()
    assert found.shape == (entries,) and (np.diff(found) >= 0).all()
    assert inertia(x, weight, found) == pytest.approx(brute_force(x, weight, entries), rel=1e-5, abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 3000), st.integers(1, 16), st.sampled_from([0, 1, 3]), st.booleans())
def test_the_optimum_is_that_of_kmeans1d(seed, count, entries, tail, tied):
    package = pytest.importorskip("kmeans1d")
    draw = np.random.default_rng(seed)
    x = draw.standard_t(tail, size=count) if tail else draw.random(count)
    x = (np.round(x * 4) / 4 if tied else x).astype(np.float32).clip(-1000, 1000)
    weight = draw.integers(1, 4, size=count)  # the package knows none, so it is given copies
    copies = np.repeat(x, weight).astype(float)
    centres = package.cluster(copies, entries).centroids
    best = inertia(copies, 1.0, centres)
    found = kmeans(torch.tensor(x)[None], torch.tensor(weight)[None].float(), entries)[0]
    allowed = 1.0005 if count > EXACT else 1 + 1e-6
    rounding = float((weight * x.astype(float) ** 2).sum()) * 1e-13  # of a codebook in fp32
    assert inertia(x, weight, found) <= best * allowed + rounding


@pytest.mark.parametrize("entries", [2, 3, 4])
def test_the_reference_for_many_values_agrees_with_brute_force(entries):
    draw = np.random.default_rng(entries)
    x, weight = draw.normal(size=11), draw.random(11)
    assert least_inertia(x, weight, entries) == pytest.approx(brute_force(x, weight, entries), rel=1e-9)


def many(name: str):
    draw = np.random.default_rng(7)
    x = draw.normal(size=50_000)
    if name == "laplace":
        x = draw.laplace(size=50_000)
    elif name == "student":
        x = draw.standard_t(3, size=50_000)
    elif name == "far outliers":
        x[:2] = -60, 60
    weight = np.ones_like(x) if name == "normal" else draw.random(x.shape) ** 4
    return x.astype(np.float32), weight.astype(np.float32)


@pytest.mark.parametrize("entries", [4, 8, 16])
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "far outliers"])
def test_many_values_are_clustered_within_half_a_permille_of_the_optimum(name, entries):
    x, weight = many(name)
    found = kmeans(torch.tensor(x)[None], torch.tensor(weight)[None], entries)[0]
    best = least_inertia(x.astype(float), weight.astype(float), entries)
    assert best * (1 - 1e-6) <= inertia(x, weight, found) <= best * 1.0005


@pytest.mark.parametrize("edges", [40, 80])
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "far outliers"])
def test_the_dynamic_program_alone_is_as_good_as_its_edges_are_dense(monkeypatch, name, edges):
    monkeypatch.setattr("qat.quant.kmeans.EDGES", edges)
    monkeypatch.setattr("qat.quant.kmeans.LLOYD_STEPS", 0)
    x, weight = many(name)
    found = kmeans(torch.tensor(x)[None], torch.tensor(weight)[None], 16)[0]
    best = least_inertia(x.astype(float), weight.astype(float), 16)
    assert inertia(x, weight, found) <= best * (1 + 3 / edges**2)


@pytest.mark.parametrize("count", [10, 5000])
def test_constant_rows_give_that_constant(count):
    found = kmeans(torch.full((1, count), 0.3), torch.ones(1, count), 4)
    assert torch.allclose(found, torch.full((1, 4), 0.3))


@pytest.mark.parametrize("count", [12, 6000])
def test_fewer_distinct_values_than_entries_are_all_kept_and_the_largest_fills_the_rest(count):
    x = torch.tensor([-1.0, 0.5, 2.0]).repeat(count // 3)[None]
    found = kmeans(x, torch.ones_like(x), 5)
    assert torch.allclose(found.double(), torch.tensor([[-1.0, 0.5, 2.0, 2.0, 2.0]]).double(), atol=1e-4)


@pytest.mark.parametrize("count", [400, 40_000])
def test_ties_change_nothing(count):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-50, 50, (1, count), generator=draw) / 10
    values, counts = x.unique(return_counts=True)
    twice = kmeans(x, torch.ones_like(x), 4)
    assert torch.allclose(twice, kmeans(values[None], counts[None].float(), 4), atol=1e-4)


@pytest.mark.parametrize("count", [100, 3000])
def test_values_without_weight_have_no_say(count):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, count, generator=draw)
    weight = (x.abs() < 1).float()
    found, alone = kmeans(x, weight, 4), kmeans(x[weight > 0][None], torch.ones(1, int(weight.sum())), 4)
    assert torch.allclose(found, alone, atol=2e-3)
    assert inertia(x[0].numpy(), weight[0].numpy(), found[0]) == pytest.approx(
        inertia(x[0].numpy(), weight[0].numpy(), alone[0]), rel=1e-4
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([50, 1000, 1300, 5000]), st.integers(1, 16), st.integers(1, 6))
def test_a_batch_gives_what_each_row_gives_alone_every_time(seed, count, entries, rows):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, count, generator=draw) ** 3 * 10 ** torch.randn(rows, 1, generator=draw)
    weight = torch.rand(rows, count, generator=draw) ** 4
    together = kmeans(x, weight, entries)
    assert torch.equal(together, kmeans(x, weight, entries))
    assert torch.equal(together, torch.cat([kmeans(x[i : i + 1], weight[i : i + 1], entries) for i in range(rows)]))


def test_neither_threads_nor_the_size_of_slices_nor_the_order_of_values_changes_a_bit(monkeypatch):
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 300_000, generator=draw) ** 3, torch.rand(2, 300_000, generator=draw) ** 4
    expected = kmeans(x, weight, 8)
    shuffled = torch.randperm(300_000, generator=draw)
    assert torch.equal(kmeans(x[:, shuffled], weight[:, shuffled], 8), expected)
    monkeypatch.setattr("qat.quant.kmeans.AT_ONCE", {"cpu": 10_000})
    assert torch.equal(kmeans(x, weight, 8), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(kmeans(x, weight, 8), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("entries", [16, 200])
def test_bounds_on_where_intervals_start_change_no_bit(monkeypatch, entries):
    draw = torch.Generator().manual_seed(6)
    x, weight = torch.randn(3, 4000, generator=draw) ** 3, torch.rand(3, 4000, generator=draw) ** 4
    weight[2] = weight[2] > 0.9
    bounded = kmeans(x, weight, entries)
    monkeypatch.setattr("qat.quant.kmeans._longer", _longer_at_once)
    assert torch.equal(kmeans(x, weight, entries), bounded)


@pytest.mark.parametrize("count", [300, 3000])
def test_weights_count_in_any_unit(count):
    draw = torch.Generator().manual_seed(4)
    x, weight = torch.randn(1, count, generator=draw), torch.rand(1, count, generator=draw) ** 4
    expected = kmeans(x, weight, 4)
    for unit in (2.0**-100, 2.0**60):
        assert torch.equal(kmeans(x, weight * unit, 4), expected)


def test_a_far_value_of_next_to_no_weight_neither_gets_an_entry_nor_leaves_the_range():
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(5))
    weight = torch.ones_like(x)
    x[0, 0], weight[0, 0] = 1000.0, 3e-14
    found = kmeans(x, weight, 4)
    assert torch.allclose(found, kmeans(x[:, 1:], weight[:, 1:], 4), atol=2e-2)


def test_the_arguments_are_left_alone():
    x, weight = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    kmeans(x, weight, 2)
    assert x.tolist() == [[3.0, 1.0, 2.0]] and weight.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        ([1.0, float("nan")], [1.0, 1.0], "value"),
        ([1.0, float("inf")], [1.0, 1.0], "value"),
        ([1.0, 2.0], [1.0, float("nan")], "weight"),
        ([1.0, 2.0], [1.0, float("inf")], "weight"),
        ([1.0, 2.0], [2.0, -1.0], "negative"),
        ([1.0, 2.0], [0.0, 0.0], "zero"),
    ],
)
def test_what_has_no_codebook_is_refused_by_name(x, weight, said):
    good = [1.0, 2.0]
    with pytest.raises(NumericsError, match=f"row 1: .*{said}"):
        kmeans(torch.tensor([good, x]), torch.tensor([[1.0, 1.0], weight]), 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 16))
def test_nearest_finds_an_entry_at_the_least_distance(seed, entries):
    draw = torch.Generator().manual_seed(seed)
    x, codebook = torch.randn(2, 5, 7, generator=draw), torch.randn(2, entries, generator=draw).sort(1).values
    index = nearest(x, codebook)
    assert index.dtype == torch.uint8 and index.shape == x.shape
    distance = (x.double()[..., None] - codebook.double()[:, None, None]).abs()
    assert torch.allclose(distance.gather(3, index.long()[..., None])[..., 0], distance.amin(3), atol=1e-6)


def test_nearest_takes_the_larger_entry_of_two_equally_near():
    assert nearest(torch.tensor([[0.5]]), torch.tensor([[0.0, 1.0]])).item() == 1
