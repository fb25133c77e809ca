import pytest
import torch

from qat.conversion import products

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_squares_are_those_of_float64(device, dtype, weighted):
    draw = torch.Generator().manual_seed(0)
    size = 2 * products.BLOCK + 44
    total, expected = torch.zeros(size, size, device=device), torch.zeros(size, size, dtype=torch.float64)
    for _ in range(3):
        x = (torch.randn(700, size, generator=draw) + 0.3).to(dtype)
        weight = torch.rand(700, generator=draw) if weighted else None
        expected += (x.double() * (1 if weight is None else weight.double()[:, None])).mT @ x.double()
        products.add_square(total, x.to(device), None if weight is None else weight.to(device))
    found = products.mirrored(total).cpu()
    assert torch.equal(found, found.mT)
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-5


def test_three_bf16_numbers_are_one_fp32_number():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 20, 10_000)
    parts = products.split(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())
