import pytest
import torch

from tests import tiny


@pytest.fixture(scope="session")
def model(teacher):
    return teacher.load(torch.float32, tiny.CPU)


@pytest.fixture(scope="session")
def rows():
    return torch.randint(256, (10, 24), generator=torch.Generator().manual_seed(0))
