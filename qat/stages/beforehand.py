"""Refuses what a model's `config.json` shows not to work, before a run has a number, a folder or a tracker.

The run looks at the same once more, with the models that it then has.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qat import models, names
from qat.artifacts import read_manifest
from qat.checkpoint_files import find
from qat.config import Config
from qat.stages import limits, teacher


def check(config: Config) -> None:
    """Looks, for a stage that makes a student, at layers, lengths and counts, and at what `export` can hold.

    Of a checkpoint that is yet to be fetched or unpacked, and of a text model inside of a larger one, the run tells.

    Raises:
        ConfigError: in one sentence, what would not work.
        MissingError: a model cannot be had.
    """
    place, start = names.start(config), None
    if place is not None:
        if (start := _manifest(place)) is None:
            return
        config = replace(config, checkpoint=replace(config.checkpoint, path=str(place)))
    artifacts = Path(config.outputs) / "artifacts"
    model = models.described(config.model, artifacts)
    beside = models.described(config.teacher, artifacts) if config.teacher else model
    if model is not None:
        teacher.check_student(config, model, start)
        limits.check_shapes(config, model, models.fitted(model, beside) if beside is not None else model)


def _manifest(place: Path) -> dict[str, Any] | None:
    """What the folder of a checkpoint says of it; None of a file, and where there is nothing yet."""
    found = find(place) if place.is_dir() else place
    return read_manifest(found) if found.is_dir() else None
