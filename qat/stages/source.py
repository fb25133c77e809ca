"""Inputs of a conversion: the model that is quantized, and the calibration text for its curvature."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat import checkpoints
from qat.artifacts import Artifact
from qat.cache.batch import Batch
from qat.cache.reader import CacheReader
from qat.quant.architectures import Layer
from qat.quant.linear import Quantized, kept, quantized
from qat.quant.places import matrix
from qat.stages.workspace import Workspace


def calibration(work: Workspace, outputs: Artifact) -> list[Batch]:
    """The first training rows of the cache, in micro-batches."""
    reader = CacheReader(outputs, "train")
    rows = max(1, work.config.convert.calibration_tokens // int(reader.meta["length"]))
    return reader.batch(torch.arange(min(rows, reader.rows))).split(work.machine.micro_batch)


class Source:
    """The model that is converted: the teacher, or the student of a checkpoint.

    Attributes:
        exact: the teacher in fp32, in host memory.
    """

    def __init__(self, work: Workspace, start: Path | None) -> None:
        self._work, self._start = work, start
        self.exact = work.teacher.load(torch.float32, torch.device("cpu"))
        self._given = self.load() if start else None
        self._made = quantized(self._given) if self._given else {}
        self._latent = checkpoints.latent(start) if start else {}

    def load(self) -> PreTrainedModel:
        """The model on the machine, new at every call."""
        machine = self._work.machine
        if self._start is None:
            return self._work.teacher.load(machine.dtype, machine.device)
        return checkpoints.load(self._start, self._work.teacher, machine)[0]

    def weight(self, name: str) -> Tensor:
        """What a layer is fitted to: its latent weight, else its quantized one, else the teacher's."""
        if name in self._latent:
            return self._latent[name]
        if name in self._made:
            return self._made[name].weight(torch.float32)
        own = self._own.get(name)
        return matrix(self.exact, name) if own is None else own

    @property
    def _own(self) -> dict[str, Tensor]:
        """The weights that a student brings itself, by layer."""
        if self._given is None:
            return {}
        own = checkpoints.own_parameters(self._given)
        places = {id(self._given.get_parameter(name)): value for name, value in own.items()}
        modules = self._given.named_modules()
        found = {name: places.get(id(getattr(module, "weight", None))) for name, module in modules}
        return {name: value for name, value in found.items() if value is not None}

    def write_own(self, layers: list[Layer], folder: Path) -> None:
        """Writes the tensors that the model does not have from the teacher, without its quantized layers."""
        if self._given:
            checkpoints.write_own(self._given, folder, besides=[layer.name for layer in layers])

    def kept(self, layer: Layer) -> Quantized | None:
        """The layer with the same indices, where its format can take them over (`Format.kept`)."""
        made = self._made.get(layer.name)
        return kept(made, layer.format) if made else None
