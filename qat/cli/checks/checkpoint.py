"""The checkpoint that a stage starts from."""

from pathlib import Path
from typing import Any

from qat import names
from qat.artifacts import MANIFEST, read_manifest
from qat.checkpoint_files import find
from qat.config import Config, ModelSource, Stage
from qat.errors import ArtifactError, ConfigError
from qat.records import read
from qat.shown import near


def check(config: Config) -> None:
    """Checks that the named path or identity is a checkpoint."""
    given = config.checkpoint
    if given.name == "local" and not given.path:
        raise ConfigError("checkpoint=local needs a name or a path: checkpoint=<run, folder, V2 state dict or archive>")
    if given.name == names.TEACHER and not given.path and config.stage is Stage.distill:
        raise ConfigError(
            "stage=distill needs a quantized start: checkpoint=<path or run>, or stage=run, which converts first"
        )
    if config.stage is not Stage.pull:
        manifest(config)
    if config.stage not in names.CARRIES:
        _refuse_model(config)


def manifest(config: Config) -> dict[str, Any] | None:
    """What the checkpoint's folder says of it; None for the teacher, a V2 state dict and where nothing is there yet.

    Raises:
        ConfigError: what is named is no checkpoint.
    """
    place = start(config)
    if place is None or not place.exists():
        return None
    try:
        found = find(place)
        if found.is_file():  # a V2 state dict: its tensors describe it, there is no manifest
            return None
        described = read_manifest(found)
    except ArtifactError as error:
        raise ConfigError(f"checkpoint={place}: {error}") from None
    if described.get("kind") != "checkpoint":
        raise ConfigError(f"checkpoint={found}: its {MANIFEST} describes no checkpoint")
    return described


def _refuse_model(config: Config) -> None:
    """Refuses a student of a run that was of another model, before any is made or fetched.

    Folders are compared by what is in them, when they are opened.
    """
    place = start(config)
    run = names.run_of(place) if place is not None and names.uses_checkpoint(config) else None
    theirs = read(run, Path(config.outputs)).section("config", "model") if run else {}
    model = config.model
    ours = {"source": model.source.name, "package": model.package, "repo": model.repo}
    if not run or not theirs or model.source is ModelSource.folder or theirs | ours == theirs:
        return
    raise ConfigError(
        f"checkpoint={near(run)} is a student of {theirs.get('path') or theirs.get('repo') or theirs.get('name')}, not"
        f" of model={model.name}: leave the model out, and that run's own is taken"
    )


def start(config: Config) -> Path | None:
    """Where the checkpoint lies or will lie; None for the teacher.

    Raises:
        ConfigError: nothing is called that, or several things are.
    """
    try:
        return names.start(config)
    except ConfigError as error:
        raise ConfigError(f"checkpoint={error}") from error
