"""What is said of all numbers at once is what is said of each."""

import pytest
import torch

from qat.finite import finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_one_number_anywhere_decides(dtype, odd):
    for count, place in ((1, 0), (7, 6), (4099, 0), (4099, 2048), (4099, 4098)):
        numbers = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
        numbers[place] = odd
        assert finite(numbers) == finite(numbers[:, None].expand(-1, 3)) == bool(numbers.isfinite().all())


def test_where_there_are_none_all_are():
    assert finite(torch.empty(0, 3))
