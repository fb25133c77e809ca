"""Hundreds of damaged files: each is refused in a sentence, or says what the undamaged one says."""

import contextlib
import json
import math
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat import checkpoints, models
from qat.artifacts import MANIFEST
from qat.errors import QatError
from tests import tiny
from tests.damage import mutations

SECONDS = 10.0  # for one file, on a machine that others use too
GIGABYTES = 1.0  # more than before
IDS = torch.arange(24).reshape(2, 12)

Use = Callable[[], Any]


class Trial:
    """Damaged files of one kind: how many were refused, how many were taken."""

    def __init__(self, good: Any) -> None:
        self.good, self.refused, self.taken = good, 0, 0

    def __call__(self, use: Use, what: str, free: bool = False) -> None:
        """Uses a damaged file; `free` where the damage may have made another good one of it."""
        began = time.monotonic()
        try:
            found = use()
        except QatError as error:
            told = str(error)
            assert told.strip() and len(told) < 3000 and "Traceback" not in told, what
            assert error.exit_code in (1, 2), what
            self.refused += 1
        else:
            assert free or same(found, self.good), f"{what}: taken, and it says something else"
            self.taken += 1
        assert time.monotonic() - began < SECONDS, what


def same(found: Any, good: Any) -> bool:
    if isinstance(good, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, good)
    if isinstance(good, dict):
        return found.keys() == good.keys() and all(same(found[key], value) for key, value in good.items())
    return bool(found == good)


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written where nobody works, and memory stays as it was."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert grown < GIGABYTES and list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def copies(tmp_path: Path) -> Callable[[Path], Path]:
    """A new copy of a folder, which holds nothing else."""

    def copy(folder: Path) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(folder, tmp_path / "copy" / folder.name)

    return copy


@torch.no_grad()
def logits(path: Path, teacher: models.ModelFolder) -> Any:
    """What a student of a checkpoint says, with its latent weights."""
    student, manifest = checkpoints.load(path, teacher, tiny.FP32)
    assert math.isfinite(checkpoints.describe(teacher, tiny.QUANT, checkpoints.layers_of(manifest))["bits_per_weight"])
    return {"logits": student(IDS).logits, **checkpoints.latent(path)}


def test_manifests(good, copies, teacher):
    best = good / "outputs" / "SR-001" / "checkpoints" / "best"
    trial, dice = Trial(logits(best, teacher)), random.Random(1)
    said = json.loads((best / MANIFEST).read_text())
    for number in range(120):
        folder = copies(best)
        (folder / MANIFEST).write_bytes(mutations.json_text(said, dice))
        trial(lambda folder=folder: logits(folder, teacher), f"manifest {number}")
    assert trial.refused > 90


def test_tensors_of_a_checkpoint(good, copies, listed, teacher):
    best = good / "outputs" / "SR-001" / "checkpoints" / "best"
    trial, dice = Trial(logits(best, teacher)), random.Random(2)
    for number in range(100):
        folder = copies(best)
        name = dice.choice(["tables.safetensors", "own.safetensors", "latent.safetensors"])
        mutations.safetensors(folder / name, dice)
        listed(folder)
        # Numbers of the file's own are what they are: moved bits, and parameters that need not be there.
        trial(lambda folder=folder: logits(folder, teacher), f"{name} {number}", free=is_number(folder, best, name))
    assert trial.refused > 60


def is_number(folder: Path, best: Path, name: str) -> bool:
    """Whether a file still is one of finite numbers of the same names, types and shapes, or of fewer optional ones."""
    from safetensors.torch import load_file

    with contextlib.suppress(Exception):
        found, known = load_file(folder / name), load_file(best / name)
        alike = all(
            one.shape == known[key].shape and (one.dtype is known[key].dtype or name.startswith("own"))
            for key, one in found.items()
        )
        finite = all(bool(one.isfinite().all()) for one in found.values() if one.is_floating_point())
        return alike and finite and (found.keys() == known.keys() or not name.startswith("tables"))
    return False


def test_state_dicts_of_the_older_scripts(good, copies, teacher):
    trial, dice = Trial(logits(good / "v2", teacher)), random.Random(3)
    said = json.loads((good / "v2" / "config.json").read_text())
    for number in range(100):
        folder = copies(good / "v2")
        if dice.random() < 0.2:
            (folder / "config.json").write_bytes(mutations.json_text(said, dice))
        else:
            mutations.pickled(folder / "best_state_dict.pt", dice)
        # Whatever may be missing is optional, and other finite numbers in it are another student's.
        trial(lambda folder=folder: logits(folder, teacher), f"state dict {number}", free=True)
    assert trial.refused > 50
