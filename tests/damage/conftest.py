"""Good files of every kind, made once, each to be copied and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat import checkpoints
from qat.artifacts import MANIFEST, hashed
from qat.checkpoints.own import adopt
from qat.config import ExportConfig, ExportType
from qat.export.packed import writer as packed
from qat.export.source import Source
from tests import tiny
from tests.checkpoints.conftest import Variant, write


@pytest.fixture(scope="session")
def good(teacher, cache, tmp_path_factory) -> Path:
    """A folder with a checkpoint that has latents and parameters of its own, and a run around it."""
    folder = tmp_path_factory.mktemp("good")
    plain = tiny.checkpoint_in(folder / "plain", teacher, cache)
    student, manifest = checkpoints.load(plain, teacher, tiny.FP32, latents=True)
    adopt(student, {"model.norm.weight": torch.full((64,), 0.9)})
    run = folder / "outputs" / "SR-001"
    checkpoints.save(student, run / "checkpoints" / "best", checkpoints.heritage(manifest) | {"run": "SR-001"})
    record = {"run_id": "SR-001", "status": "complete", "stage": "run", "metrics": {"kl": 0.5}, "paths": {}}
    (run / "result.json").write_text(json.dumps(record))
    write(Variant(), teacher, folder / "v2" / "best_state_dict.pt")
    settings = ExportConfig(name="packed", format="packed", dtype=ExportType.fp32)
    source = Source(teacher, student, manifest)
    (folder / "packed").mkdir()
    packed.write(source, folder / "packed", settings)
    shutil.copytree(teacher.path, folder / "model", ignore=shutil.ignore_patterns(MANIFEST))
    return folder


@pytest.fixture
def listed() -> Callable[[Path], None]:
    """Enters files of a folder into its manifest as they are now, as whoever means harm would."""

    def enter(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [name for name in manifest["files"] if (folder / name).is_file()]
        for name, digest in zip(names, hashed([folder / name for name in names]), strict=True):
            manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return enter
