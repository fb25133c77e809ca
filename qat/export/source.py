"""The model to export: a student or the teacher itself, in fp32 on the CPU, with its figures."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat import checkpoints, model_files, names
from qat.checkpoint_files import find
from qat.config import ExportType
from qat.errors import ConfigError, NumericsError
from qat.finite import finite
from qat.machine import Machine
from qat.models import ModelFolder
from qat.quant import adapter, vocabulary
from qat.quant.architectures import Layer
from qat.quant.formats import Codebook
from qat.quant.size import summary
from qat.records import Record, read

CPU = torch.device("cpu")
EXACT = Machine(CPU, torch.float32, 1)
DTYPES = {
    ExportType.fp32: torch.float32,
    ExportType.bf16: torch.bfloat16,
    ExportType.fp16: torch.float16,
}
LICENSE = "LICENSE*"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        teacher: the folder that tokenizer, template and architecture come from.
        model: in fp32 on the CPU; quantized layers are `QuantLinear`s.
        manifest: what its checkpoint says; empty for the teacher itself.
        checkpoint: where it came from; None is the teacher itself.
        record: of the run that made the checkpoint, where there is one.
        dtype: of what is not quantized in the packed file whose size is told.
        exact: that file does not round embedding and head.
        adapters: the checkpoint whose adapters are to lie beside the export; None where it has none, or merges them.
    """

    teacher: ModelFolder
    model: PreTrainedModel
    manifest: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    record: Record = field(default_factory=lambda: Record(Path(), {}, ""))
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    adapters: Path | None = None

    def latent(self) -> dict[str, Tensor]:
        """The weights that the codebooks stand for, by layer, where the checkpoint has them."""
        return checkpoints.latent(self.checkpoint) if self.checkpoint else {}

    @property
    def layers(self) -> list[Layer]:
        """The quantized layers; none in the teacher."""
        return checkpoints.layers_of(self.manifest) if self.manifest else []

    @property
    def adapted(self) -> bool:
        """Whether the checkpoint has adapters."""
        return self.adapters is not None or bool(adapter.adapters(self.model))

    @property
    def quant(self) -> dict[str, Any]:
        """Preset, counts and sizes, as `result.json` has them."""
        if not self.manifest:
            return {}
        sizes = summary(self.layers, self.teacher.skeleton(), self.dtype, self.exact)
        return {"preset": self.manifest["quant"]["name"], **sizes}


def open_source(teacher: ModelFolder, checkpoint: Path | None, merge: bool = False) -> Source:
    """The student of a checkpoint, or the teacher where there is none.

    It has no adapters, unless these are to be merged into its weights.

    Raises:
        ArtifactError: the checkpoint is damaged or does not belong to this teacher.
    """
    if checkpoint is None:
        return Source(teacher, teacher.load(torch.float32, CPU))
    model, manifest = checkpoints.load(checkpoint, teacher, EXACT)
    beside = None if merge or not adapter.adapters(model) else find(checkpoint)
    if beside is not None:
        adapter.remove(model)
    made = Source(teacher, model, manifest, checkpoint, adapters=beside)
    run = names.run_of(checkpoint)
    return replace(made, record=read(run, run)) if run else made


def require_codebooks(source: Source, tool: str) -> None:
    """Refuses a student with projections in another format than codebooks; embedding and head are written dense.

    Raises:
        ConfigError: it has one; the sentence says which, and for which tool.
    """
    inner = [layer for layer in source.layers if layer.role not in vocabulary.ROLES]
    if source.layers and not inner:
        raise ConfigError(f"{tool} holds codebooks of projections, and none is quantized here: use export=packed or hf")
    for layer in inner:
        if not isinstance(layer.format, Codebook):
            raise ConfigError(
                f"{tool} knows codebooks alone, and {layer.name} is in the format {layer.format.name}:"
                " export=packed and export=hf take any"
            )


def copy_tokenizer(teacher: ModelFolder, folder: Path) -> None:
    """Copies tokenizer, chat template, generation defaults and licence, and names every token that ends a text."""
    for file in [*model_files.text(teacher.path), *teacher.path.glob(LICENSE)]:
        shutil.copyfile(file, folder / file.name)
    defaults = model_files.read(folder / model_files.GENERATION)
    if ends := list(teacher.ends()):
        defaults |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    text = json.dumps(defaults, indent=2, ensure_ascii=False) + "\n"
    (folder / model_files.GENERATION).write_text(text, encoding="utf-8")


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type.

    Raises:
        NumericsError: a value is too large for it.
    """
    made = value.detach().to(dtype)
    if not finite(made):
        shown = str(dtype).removeprefix("torch.")
        raise NumericsError(f"{name} has values that {shown} cannot hold: export with export.dtype=fp32")
    return made
