"""A student at more bits, trained before the one that is asked for is converted from it.

It is an artifact: runs that differ in what follows share it, and it is trained when no such checkpoint exists.
"""

from dataclasses import replace
from pathlib import Path

from qat import manifests
from qat.artifacts import Artifact, obtain, require
from qat.config import CheckpointConfig, FirstConfig
from qat.shaping import shaping
from qat.stages import convert, distill
from qat.stages.workspace import Workspace


def make(work: Workspace, cached: Artifact, first: FirstConfig) -> Path:
    """The folder of the trained checkpoint."""
    earlier = replace(
        work.config, quant=first.quant, mode=first.mode, train=first.train, checkpoint=CheckpointConfig("teacher")
    )
    inner = replace(work, config=earlier)
    start = convert.make(inner, cached)
    inputs = {
        "start": start.key,
        "cache": cached.key,
        "mode": shaping(first.mode),
        "loss": shaping(earlier.loss),
        "train": shaping(first.train),
        "seed": earlier.seed,
    }
    name = f"{work.model.name}_{first.quant.name}_{first.mode.name}"

    def train(folder: Path) -> dict[str, object]:
        return distill.train_into(inner, cached, start.folder, folder)

    with work.timed("first"):
        made = obtain(work.artifacts, "checkpoints", name, inputs, train, at=work.machine.place())
    require(made, manifests.TRAINED)
    work.run.uses("first", made)
    work.run.result["paths"]["first"] = str(made.folder)
    work.run.result["metrics"]["first_kd_loss"] = made.manifest["kd_loss_best"]
    return made.folder


def converted_from(work: Workspace, folder: Path) -> Workspace:
    """The same run, starting from that checkpoint."""
    return replace(work, config=replace(work.config, checkpoint=CheckpointConfig("local", str(folder))))
