"""The comparison's own arithmetic: bits, round-to-nearest, and the proof that weights are quantized."""

import math

import peers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import grid, rtn
from peers.grid import Grid

from qat.errors import ConfigError, NumericsError, UnavailableError


def test_bits_per_weight_are_the_stored_bits_over_the_weights():
    rows, columns = 6, 192
    for bits, group, zero in [(2, 64, 2), (3, 16, 3), (2, 64, 16), (4, 32, 4)]:
        stored = rows * columns * bits + rows * (columns // group) * (16 + zero)
        assert math.isclose(Grid(bits, group, zero).bits_per_weight, stored / (rows * columns))


def test_known_bits_per_weight():
    assert peers.PEERS["gptq"].grid(2, 64).bits_per_weight == 2.28125
    assert peers.PEERS["hqq"].grid(3, 64).bits_per_weight == 3.5


def test_mean_bits_weighs_layers_by_their_size():
    assert grid.mean_bits([(300, 2.0), (100, 4.0)]) == 2.5


def test_bits_and_group_are_read():
    assert grid.parse("3:128") == (3, 128)


@pytest.mark.parametrize("text", ["", "2", "2:", ":64", "two:64", "0:64", "9:64", "2:0", "2:64:1", "-2:64"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match="bits:group"):
        grid.parse(text)


def test_levels_are_counted_in_the_worst_group():
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0], [5.0, 6.0, 7.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert grid.levels(weight, 4) == 3
    assert grid.levels(weight, 2) == 2
    assert grid.levels(weight[2:], 4) == 1


@pytest.fixture
def weight():
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def test_a_weight_that_is_not_quantized_is_found_in_its_one_bad_group(weight):
    rounded = rtn.round_to_nearest(weight, Grid(2, 64, 2))
    assert grid.prove("layer", rounded, weight, Grid(2, 64, 2)) == 4
    rounded[5, 70] += 1e-4
    with pytest.raises(NumericsError, match="layer is not quantized: a group of 64 holds 5 values where 2 bits tell 4"):
        grid.prove("layer", rounded, weight, Grid(2, 64, 2))


def test_a_weight_of_another_layer_or_with_shifted_zero_points_is_refused(weight):
    rounded = rtn.round_to_nearest(weight, Grid(2, 64, 2))
    step = rounded.view(-1, 64).sort(dim=1).values.diff(dim=1).amax(1).repeat_interleave(64).view_as(rounded)
    for wrong in (rounded + step, rounded.flip(0), rounded * torch.nan):
        with pytest.raises(NumericsError, match="layer is "):
            grid.prove("layer", wrong, weight, Grid(2, 64, 2))
    with pytest.raises(NumericsError, match="came back as"):
        grid.prove("layer", rounded.T, weight, Grid(2, 64, 2))


@given(bits=st.integers(1, 4), group=st.sampled_from([8, 32]), seed=st.integers(0, 2**16))
def test_rounding_finds_the_nearest_value_of_the_grid(bits, group, seed):
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    rounded = rtn.round_to_nearest(weight, Grid(bits, group, bits))
    assert grid.levels(rounded, group) <= 2**bits
    for values, found in zip(weight.view(-1, group).tolist(), rounded.view(-1, group).tolist(), strict=True):
        low, high = min(0.0, *values), max(0.0, *values)
        scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
        zero = round(-low / scale)
        points = [(index - zero) * scale for index in range(2**bits)]
        for value, got in zip(values, found, strict=True):
            least = min(abs(point - value) for point in points)
            assert math.isclose(abs(got - value), least, rel_tol=1e-4, abs_tol=1e-5)
            assert min(abs(point - got) for point in points) < 1e-5


def test_rounding_leaves_zeros_alone():
    assert not rtn.round_to_nearest(torch.zeros(2, 64), Grid(2, 64, 2)).any()


def test_a_peer_that_is_not_installed_is_told_by_name():
    missing = peers.Peer("Nobody", "rtn", None, False, "no-such-package")
    with pytest.raises(UnavailableError, match=r"Nobody cannot run here .*pip install no-such-package"):
        missing.load()
