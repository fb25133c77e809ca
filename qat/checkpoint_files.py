"""What lies at a checkpoint's path: a folder of ours, a run that made one, or a V2 state dict; found without torch,
so that the command line can ask as well.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat import json_objects, manifests
from qat.artifacts import MANIFEST, read_manifest
from qat.errors import ArtifactError, ConfigError, reason
from qat.identities import RESULT
from qat.installation import command
from qat.records import Record, read

# File names that the V2 scripts give a state dict, in order of preference.
STATE_DICTS = ("best_state_dict.pt", "model_state_dict.pt", "final_state_dict.pt", "last_state_dict.pt")

# Adapters beside the quantized layers of a checkpoint, under the names that PEFT gives them.
ADAPTERS, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"

BEST = os.path.join("checkpoints", "best")

REMEDY = "copy the checkpoint again from where it came, or make it again"


def find(path: Path) -> Path:
    """A checkpoint folder (with a manifest) or a V2 state dict file (`.pt`), our own V2 exports among them.

    A run's folder stands for its best checkpoint, or for its conversion where it is one of `stage=convert`.
    An archive may have wrapped its files in a folder or two: a folder that holds nothing but one folder
    stands for that one.

    Raises:
        ArtifactError: neither is there, or several state dicts and none that says it is the one.
    """
    while os.path.isdir(path):
        files = sorted(path.glob("*.pt"))
        if os.path.isfile(path / MANIFEST) and not (files and read_manifest(path).get("kind") == "export"):
            return path
        if files:
            return path / chosen([file.name for file in files], path)
        if os.path.isdir(path / BEST):
            return path / BEST
        if os.path.isfile(path / RESULT):
            return _of_run(read(path, path.parent))
        inside = [entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] not in "._"]
        if len(inside) != 1:
            raise ArtifactError(
                f"{path}: no {MANIFEST} there and no state dict (*.pt), so no checkpoint; name a run, as in"
                " checkpoint=SR-007, a checkpoint folder or a V2 state dict"
            )
        path = inside[0]
    if not os.path.exists(path):
        raise ArtifactError(f"there is no checkpoint {path}: name a checkpoint folder, a run or a V2 state dict (*.pt)")
    if os.path.isfile(path) and path.suffix != ".pt":
        raise ArtifactError(f"{path} is no checkpoint: name a checkpoint folder or a V2 state dict (*.pt)")
    return path


def has_adapters(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has adapters, by its manifest."""
    return ADAPTERS in manifest["files"]


def adapters_of(folder: Path, remedy: str) -> tuple[int, float]:
    """Rank and alpha of the adapters in a checkpoint's folder.

    Raises:
        ArtifactError: nothing there says them.
    """
    path = folder / ADAPTERS_CONFIG
    try:
        said = json_objects.read(path)
        manifests.ADAPTERS(said, "")
    except (OSError, ValueError) as error:  # `Wrong` is one of the latter
        raise ArtifactError(f"{path} describes no adapters ({reason(error)}): {remedy}") from None
    return said["r"], float(said["lora_alpha"])


def refuse_other_adapters(known: tuple[int, float], asked: tuple[int, float]) -> None:
    """Refuses to train adapters of some rank and alpha on a student that has others.

    Raises:
        ConfigError: they differ.
    """
    if known != asked:
        theirs, given = (f"mode.rank={rank} mode.alpha={alpha:g}" for rank, alpha in (known, asked))
        raise ConfigError(
            f"the checkpoint has adapters of {theirs}, which training with {given} would not go on with: use"
            f" mode=lora {theirs}, or a checkpoint without adapters"
        )


def chosen(files: list[str], where: Path | str) -> str:
    """The one of several state dicts, by their names, that is meant.

    Raises:
        ArtifactError: none says that it is.
    """
    named = [name for name in STATE_DICTS if name in files]
    if not named and len(files) > 1:
        raise ArtifactError(f"{where} holds several state dicts ({', '.join(files)}): name one of these files")
    return [*named, *files][0]


def _of_run(run: Record) -> Path:
    """What `stage=convert` made; it lies among the artifacts, which may have moved together with the run."""
    conversion = run.text("paths", "conversion")
    if run.text("stage") != "convert" or not conversion:
        raise ArtifactError(f"{run.folder} has no checkpoint: {_why(run)}")
    name = os.path.basename(conversion)
    around = [parent / "artifacts" / "checkpoints" / name for parent in run.folder.resolve().parents]
    there = next((path for path in (*around, Path(conversion)) if os.path.isdir(path)), None)
    if there is None:
        raise ArtifactError(f"{run.folder} has no checkpoint: its conversion {name} is gone; {_again(run)}")
    return there


def _why(run: Record) -> str:
    """Why a run has no checkpoint, and what to do."""
    stage = run.text("stage")
    if run.status == "unreadable":
        return f"its {RESULT} cannot be read"
    if stage not in ("run", "distill", "convert"):
        return f"it is a run of stage={stage}, which makes none"
    if run.status == "complete":
        return f"it was deleted; {_again(run)}"
    ended = f"it failed ({run.text('error')})" if run.status == "failed" else "it was interrupted, or is still at work"
    return f"{ended}; {_again(run)}"


def _again(run: Record) -> str:
    resume = "" if run.text("stage") == "convert" else f" run.resume={run.run_id}"
    return f"to make it: {command()} --config-path {run.folder}{resume}"
