"""What lies at a checkpoint's path: a folder of ours or a V2 state dict; found without torch, so that the
command line can ask as well.
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path

from qat.artifacts import MANIFEST, read_manifest
from qat.errors import ArtifactError

# What the V2 scripts call a state dict, the one to take first.
STATE_DICTS = ("best_state_dict.pt", "model_state_dict.pt", "final_state_dict.pt", "last_state_dict.pt")

BEST = os.path.join("checkpoints", "best")


def locate(text: str, outputs: Callable[[], str]) -> str:
    """The checkpoint folder meant by a path, a run's folder, a run's name or the name of what was pulled.

    Args:
        text: as the user wrote it; returned as it is where nothing is found.
        outputs: finds the outputs folder; called only when `text` is no path.
    """
    path = os.path.expanduser(text)
    if os.path.isfile(os.path.join(path, MANIFEST)):
        return path
    if os.path.isdir(os.path.join(path, BEST)):
        return os.path.join(path, BEST)
    if os.path.exists(path) or os.path.isabs(path):
        return path
    base = Path(outputs())
    # A job of a sweep is a run too.
    runs = [run / BEST for run in (base / path, *sorted(base.glob("sweep-*/" + glob.escape(path))))]
    places = [*runs, base / "checkpoints" / path]
    return next((str(place) for place in places if place.is_dir()), path)


def find(path: Path) -> Path:
    """A checkpoint folder (with a manifest) or a V2 state dict file (`.pt`), our own V2 exports among them.

    An archive may have wrapped its files in a folder or two: a folder that holds nothing but one folder
    stands for that one.

    Raises:
        ArtifactError: neither is there, or several state dicts and none that says it is the one.
    """
    while path.is_dir():
        files = sorted(path.glob("*.pt"))
        if (path / MANIFEST).is_file() and not (files and read_manifest(path).get("kind") == "export"):
            return path
        if files:
            return _chosen(path, files)
        inside = [entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] not in "._"]
        if len(inside) != 1:
            raise ArtifactError(
                f"{path}: no {MANIFEST} there and no state dict (*.pt), so no checkpoint; name the folder"
                " checkpoints/best of a run, the run itself, as in checkpoint=SR-007, or a V2 state dict"
            )
        path = inside[0]
    if not path.exists():
        raise ArtifactError(f"there is no checkpoint {path}: name a checkpoint folder, a run or a V2 state dict (*.pt)")
    if path.is_file() and path.suffix != ".pt":
        raise ArtifactError(f"{path} is no checkpoint: name a checkpoint folder or a V2 state dict (*.pt)")
    return path


def _chosen(folder: Path, files: list[Path]) -> Path:
    named = [folder / name for name in STATE_DICTS if folder / name in files]
    if not named and len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise ArtifactError(f"{folder} holds several state dicts ({listed}): name one of these files")
    return [*named, *files][0]
