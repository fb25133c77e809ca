"""Inputs of a conversion: the model that is quantized, and the calibration text for its curvature."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat import checkpoints
from qat.artifacts import Artifact
from qat.cache.batch import Batch
from qat.cache.reader import CacheReader
from qat.conversion.convert import Shelf, install
from qat.fidelity.sample import Rows
from qat.models.streamed import matrix_of, stream_of
from qat.quant.architectures import Layer
from qat.quant.linear import Quantized, kept, quantized
from qat.stages.workspace import Workspace


def calibration(work: Workspace, outputs: Artifact) -> list[Batch]:
    """The first training rows of the cache, in micro-batches."""
    reader = CacheReader(outputs, "train")
    rows = max(1, work.config.convert.calibration_tokens // int(reader.meta["length"]))
    return reader.batch(torch.arange(min(rows, reader.rows))).split(work.machine.micro_batch)


class Source:
    """The model that is converted: the original, or the student of a checkpoint.

    Decoder layers of the original are read when they are needed, where that can be; a student is in memory.
    """

    def __init__(self, work: Workspace, start: Path | None) -> None:
        self._work, self._start = work, start
        self._given = self._student() if start else None
        self._made = quantized(self._given) if self._given else {}
        self._latent = checkpoints.latent(start) if start else {}

    @property
    def starts(self) -> bool:
        """Whether it is a student, some of whose layers are quantized already."""
        return bool(self._made)

    @cached_property
    def original(self) -> PreTrainedModel:
        """The model as it is before any quantization, on the machine."""
        machine = self._work.machine
        return self._work.model.stream(machine.dtype, machine.device)

    def settle(self, rows: Rows) -> None:
        """Finds out how it is computed over such rows."""
        self._work.settle(self._work.model, rows, self.original)

    def load(self, shelf: Shelf | None, layers: Sequence[Layer] = ()) -> PreTrainedModel:
        """The model on the machine, with the layers of a shelf in it; the original itself where it has none."""
        if self._start is None and shelf is None:
            return self.original
        machine = self._work.machine
        if self._start is not None:
            model = self._student()
        else:
            model = self._work.model.stream(machine.dtype, machine.device, self.original)
        if shelf is None:
            return model
        if (stream := stream_of(model)) is None:
            install(model, {layer.name: shelf.get(layer) for layer in layers})
        else:
            stream.put({layer.name: partial(_weight, shelf, layer) for layer in layers})
        return model

    def weight(self, name: str) -> Tensor:
        """What a layer is fitted to: its latent weight, else its quantized one, else the original's."""
        if name in self._latent:
            return self._latent[name]
        if name in self._made:
            return self._made[name].weight(torch.float32)
        own = self._own.get(name)
        return self._exact(name) if own is None else own

    @cached_property
    def _exact(self) -> Callable[[str], Tensor]:
        """Gives the original's matrices in fp32: where it computes in that, those that it computes with."""
        exact = self._work.machine.dtype is torch.float32 and self._start is None
        return partial(matrix_of, self.original) if exact else self._work.model.matrices()

    def _student(self) -> PreTrainedModel:
        assert self._start is not None
        return checkpoints.load(self._start, self._work.model, self._work.machine)[0]

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
        """Writes the tensors that the model does not have from the original, without its quantized layers."""
        if self._given:
            checkpoints.write_own(self._given, folder, besides=[layer.name for layer in layers])

    def kept(self, layer: Layer) -> Quantized | None:
        """The layer with the same indices, where its format can take them over (`Format.kept`)."""
        made = self._made.get(layer.name)
        return kept(made, layer.format) if made else None


def _weight(shelf: Shelf, layer: Layer) -> Tensor:
    return shelf.get(layer).weight(torch.float32)
