import pytest

from qat import checkpoints
from qat.cache.reader import CacheReader
from tests import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="session")
def readers(cache):
    return CacheReader(cache, "train"), CacheReader(cache, "eval")


@pytest.fixture(scope="session")
def checkpoint(teacher, cache, folder):
    return tiny.checkpoint_in(folder / "start", teacher, cache)


@pytest.fixture
def student(checkpoint, teacher):
    return checkpoints.load(checkpoint, teacher, tiny.FP32)[0]
