"""Look-ups and sums by entry on a CPU, whose pieces several cores share."""

import pytest
import torch

from qat.quant.formats.grid import LEVELS
from qat.quant.lookup import COUNTED, entry_sums, look_up, snapped


@pytest.fixture(params=[1, 2])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_values_and_sums_do_not_depend_on_the_cores(cores):
    draw = torch.Generator().manual_seed(0)
    layers, entries, shape = 2, 5, (2, 3, COUNTED // 2 + 7)
    x, values = torch.randn(shape, generator=draw), torch.randn(layers, entries, generator=draw)
    index = torch.randint(entries - 1, shape, generator=draw, dtype=torch.uint8)  # nothing has the last one
    plain = torch.stack([row[at.long()] for row, at in zip(values, index, strict=True)])
    assert look_up(values, index).equal(plain) and look_up(values[0], index[0]).equal(plain[0])
    masked = torch.stack([(x.double() * (index == k)).sum((1, 2)) for k in range(entries)], 1)
    assert torch.allclose(entry_sums(x, index, entries), masked.float(), rtol=1e-6) and not masked[:, -1].any()


@pytest.mark.parametrize(("levels", "bits"), [(levels, bits) for levels in LEVELS for bits in (1, 2, 4, 8)])
def test_each_number_snaps_to_the_value_nearest_to_it(levels, bits):
    values = LEVELS[levels](bits).float()
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * values.abs().max()
    x[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, 1e30])
    away = (x.double()[..., None].clamp(-1e6, 1e6) - values).abs()
    found = snapped(x.clone(), values)
    assert torch.isin(found, values).all()
    assert (x.double().clamp(-1e6, 1e6) - found).abs().allclose(away.amin(-1), rtol=0, atol=1e-4)
