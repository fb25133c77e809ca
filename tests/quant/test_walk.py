import pytest
import torch

from qat.quant import walk

cuda = pytest.mark.skipif(not torch.cuda.is_available() or walk.triton is None, reason="needs CUDA and Triton")


@cuda
@pytest.mark.parametrize("from_value", [True, False])
@pytest.mark.parametrize(("rows", "columns", "entries"), [(1, 1, 2), (40, 64, 4), (33, 17, 16)])
def test_the_gpu_walks_as_the_cpu_does(from_value, rows, columns, entries):
    draw = torch.Generator().manual_seed(0)
    wanted, S, value = (torch.randn(3, rows, columns + 5, generator=draw)[:, :, 2 : 2 + columns] for _ in range(3))
    codebook = torch.randn(3, entries, generator=draw).sort(1).values
    spread = torch.randn(3, columns, columns, generator=draw) / 8
    found = []
    for device in ("cpu", "cuda"):
        index = torch.zeros(3, rows, columns, dtype=torch.uint8, device=device)
        moved = torch.zeros(3, rows, columns, device=device)
        before = value.to(device) if from_value else None
        walk.walk_block(wanted.to(device), S.to(device), codebook.to(device), spread.to(device), before, index, moved)
        found.append((index.cpu(), moved.cpu()))
    same = (found[0][0] == found[1][0]).all(2)
    assert same.float().mean() > 0.97  # rounding may tip a weight that lies between two entries, and all behind it
    assert torch.allclose(found[0][1][same], found[1][1][same], rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


BEYOND_A_PANEL, SHARED_OUT = (3, walk.PANEL + 40, 4), (walk.WORTH + 9, 20, 16)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("from_value", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "entries"), [(1, 1, 2), (40, 64, 4), (33, 17, 256), BEYOND_A_PANEL, SHARED_OUT]
)
def test_a_column_takes_the_nearest_value_and_later_ones_make_up_for_it(from_value, rows, columns, entries):
    """Against float64, column by column; the walk's own changes are passed on, so that none tips all behind it."""
    draw = torch.Generator().manual_seed(0)
    wanted, S, value = (torch.randn(2, rows, columns, generator=draw) for _ in range(3))
    values = torch.randn(2, entries, generator=draw).sort(1).values
    spread = torch.randn(2, columns, columns, generator=draw) / 8
    index, moved = torch.zeros(2, rows, columns, dtype=torch.uint8), torch.zeros(2, rows, columns)
    walk.walk_block(wanted.clone(), S, values, spread, value if from_value else None, index, moved)
    left = wanted.double()
    for j in range(columns):
        away = (left[:, :, j, None] - values.double()[:, None] * S.double()[:, :, j, None]).abs()
        chosen = away.gather(2, index[:, :, j, None].long())[..., 0]
        assert (chosen <= away.amin(2) + 1e-5 * left[:, :, j].abs() + 1e-5).all()
        taken = values.double().gather(1, index[:, :, j].long()) * S[:, :, j]
        start = value[:, :, j] if from_value else left[:, :, j]
        assert torch.allclose(moved[:, :, j].double(), taken - start, rtol=1e-4, atol=1e-4)
        left[:, :, j + 1 :] -= spread.double()[:, None, j, j + 1 :] * moved[:, :, j, None]
