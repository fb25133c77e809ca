"""What every test stands on: no network, no home, no path outside pytest's temporary folders, one thread."""

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests import launching, quick

if TYPE_CHECKING:
    from qat.artifacts import Artifact
    from qat.machine import Machine
    from qat.models import ModelFolder

# Read when torch, huggingface_hub and wandb are first imported, here and in processes that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    # Read when a process starts: memory that is freed stays with it, as it asks for as much again all the time.
    MALLOC_MMAP_THRESHOLD_=str(1 << 32),
    MALLOC_TRIM_THRESHOLD_=str(1 << 32),
    MALLOC_TOP_PAD_=str(1 << 26),
)

# What is flushed to the disk outlives a power cut, which no test makes; what is killed loses nothing that it wrote.
os.fsync = lambda descriptor: None

# The same examples every time, and no clock: the machine may be busy.
settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=30)
settings.load_profile("steady")

gc.disable()  # while modules are imported and tests collected, of which nothing is garbage

# What some tests make for all that follow in their file takes seconds. These come first, as a worker that has done its
# share takes over the last tests of another, and would make it anew.
TOGETHER = ("test_pipeline.py", "test_ranks.py", "test_smollm2.py")

_kept = 0  # modules that were there when their objects were taken out of the collector's sight
_coarse: list[int] = []  # among how many places a codebook's boundaries are sought elsewhere, once that is changed here


def pytest_configure(config: pytest.Config) -> None:
    """Every run of pytest notes how long tests take, for `make quick`."""
    config.pluginmanager.register(quick.Seconds(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file that share much are run by one worker; `make quick` has an order of its own."""
    if quick.UNTIL not in os.environ:
        items.sort(key=lambda item: item.path.name not in TOGETHER)


def pytest_collection_finish() -> None:
    """What was imported and collected stays, so nobody looks through it for garbage again."""
    if "qat.cli.compose" in sys.modules:
        from tests import composing

        composing.once()
    _keep()
    gc.enable()
    gc.set_threshold(10_000)  # what tests leave behind is looked through a tenth as often


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What earlier tests imported stays as well, such as the code of a family of models."""
    if len(sys.modules) >= _kept + 20:
        _keep()
    if not _coarse and (kmeans := sys.modules.get("qat.quant.kmeans")):
        _coarse.append(kmeans.MAX_EDGES)
        kmeans.MAX_EDGES = launching.EDGES


def _keep() -> None:
    global _kept
    gc.collect()
    gc.freeze()
    _kept = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, no login, and a loud refusal of any connection to elsewhere."""
    home = tmp_path_factory.mktemp("home")
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test wants the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"):
            patch.setenv(name, str(home))
        for name in ("WANDB_API_KEY", "NETRC", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setattr(socket.socket, "connect", refuse)
        yield home


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are only begun, but where a test is about pictures and asks for `drawn`."""
    if "drawn" not in request.fixturenames and "matplotlib.figure" in sys.modules:
        from tests import undrawn

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", undrawn.savefig)


@pytest.fixture
def drawn() -> None:
    """Pictures are drawn."""


@pytest.fixture(autouse=True)
def untidy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases of a run in this process look for no garbage between them."""
    if system := sys.modules.get("qat.system"):
        monkeypatch.setattr(system, "tidy", lambda: None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "ModelFolder":
    """The two-layer teacher; read only."""
    from qat import models
    from qat.config import ModelConfig, ModelSource

    config = ModelConfig(name="tiny", source=ModelSource.tiny, vocab_size=512)
    return models.locate(config, tmp_path_factory.mktemp("tiny") / "artifacts")


@pytest.fixture(scope="session")
def cpu() -> "Machine":
    """The CPU in fp32, four sequences at once."""
    import torch

    from qat.machine import Machine

    return Machine(torch.device("cpu"), torch.float32, 4)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> "ModelFolder":
    """The tiny teacher that the helpers of `tests.tiny` build on; read only."""
    from tests import tiny

    return tiny.teacher_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def cache(teacher: "ModelFolder", tmp_path_factory: pytest.TempPathFactory) -> "Artifact":
    """A small cache of that teacher; read only."""
    from tests import tiny

    return tiny.cache_of(teacher, tmp_path_factory.mktemp("cache"))
