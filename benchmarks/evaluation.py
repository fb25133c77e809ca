"""Students beside their teacher on held-out texts: what every comparison of quality is measured by."""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from conversion import texts
from peers.grid import Grid, mean_bits
from peers.stored import Stored
from results import OURS, Results
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from qat import checkpoints
from qat import machine as machines
from qat.artifacts import read_manifest
from qat.cache.batch import Text
from qat.checkpoint_files import find
from qat.config import InstanceConfig, ModelConfig, ModelSource, Precision
from qat.evaluate import evaluate
from qat.export.packed import writer
from qat.fidelity import Sample, settle
from qat.forward import body
from qat.machine import DTYPES, Machine
from qat.models import ModelFolder, locate, made_before
from qat.quant.architectures import Layer
from qat.quant.embedding import put
from qat.quant.formats import GroupGrid
from qat.quant.size import bits_per_weight, file_bytes, model_bits_per_weight, rounded

TOP_K = 64  # tokens that `kd_loss` looks at

Student = tuple[PreTrainedModel, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One point of the comparison.

    Attributes:
        method: what the picture groups by: a peer's label, or ours and how it was made.
        name: which of the method's models: bits and group, or the preset.
        settings: everything that shapes its weights, as JSON values.
        students: each gives a model in a compute type, and what its row says beside its figures; several are
            the same model from different seeds.
    """

    method: str
    name: str
    settings: dict[str, Any]
    students: tuple[Callable[[torch.dtype], Student], ...]


class Evaluation:
    """The teacher, the texts and the machine.

    Attributes:
        machine: as instance=auto has it.
        judge: the same machine, in the precision that figures are taken in.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        instance = InstanceConfig(name="auto", micro_batch=options.micro_batch)
        self.machine = machines.resolve(instance)
        self.folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
        precision = DTYPES[Precision[options.precision]]
        self.judge = Machine(self.machine.device, precision, options.micro_batch)
        self.held_out = {
            Path(path).stem: texts([path], self.folder, options.length, options.tokens) for path in options.evaluation
        }

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher that students are measured against."""
        model = self.folder.load(self.judge.dtype, self.machine.device)
        settle(self.folder, self.judge, Sample.of_rows(Text(next(iter(self.held_out.values())))), model)
        return remembering(model)

    def evaluate(self, student: PreTrainedModel, text: str) -> dict[str, float]:
        """Figures of a student on one text."""
        figures = asdict(evaluate(student, self.teacher, Text(self.held_out[text]), TOP_K, self.judge))
        return {"agreement" if name == "top1_agreement" else name: value for name, value in figures.items()}

    def measure(self, entry: Entry, results: Results) -> None:
        """Adds an entry's rows, one a text, where they are not there already."""
        rows = [self._row(entry, text) for text in self.held_out]
        missing = [row for row in rows if not results.has(row)]
        found: dict[str, list[dict[str, float]]] = {row["text"]: [] for row in missing}
        for number, make in enumerate(entry.students if missing else (), 1):
            student, told = make(self.judge.dtype)
            for row in missing:
                found[row["text"]].append(self.evaluate(student, row["text"]))
                if number == len(entry.students):
                    row |= told | averaged(found[row["text"]])
                    results.add(row | {"device": self.judge.describe(), "date": time.strftime("%Y-%m-%d")})
                    print(
                        f"{entry.method} {entry.name} {row['text']}: kl {row['kl']:.4f} at {row['megabytes']:.1f} MB",
                        flush=True,
                    )

    def _row(self, entry: Entry, text: str) -> dict[str, Any]:
        """A row without its figures."""
        ids = self.held_out[text]
        settings = entry.settings | {
            "teacher": self.folder.fingerprint,
            "evaluation": digest(ids),
            "tokens": ids.numel(),
            "length": ids.shape[1],
            "precision": str(self.judge.dtype).removeprefix("torch."),
        }
        return {"method": entry.method, "name": entry.name, "text": text, "settings": settings}


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """A teacher that computes the hidden states of each batch once, however many students meet it."""
    part, known = body(model), {}
    forward = part.forward

    def remembered(input_ids: torch.Tensor, **inputs: Any) -> BaseModelOutput:
        """States are kept in host memory."""
        key = digest(input_ids.cpu())
        if key not in known:
            known[key] = forward(input_ids=input_ids, **inputs)[0].cpu()
        return BaseModelOutput(known[key].to(input_ids.device))

    part.forward = remembered
    return model


def averaged(figures: list[dict[str, float]]) -> dict[str, Any]:
    """Means; of several seeds, also how many and the sample standard deviation of each figure."""
    columns = {name: [one[name] for one in figures] for name in figures[0]}
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    if len(figures) == 1:
        return means
    return {**means, "seeds": len(figures), "deviation": {k: statistics.stdev(v) for k, v in columns.items()}}


def trained(work: Evaluation, name: str, paths: Iterable[Path]) -> Entry:
    """Trained students of one preset, one a seed."""
    found = [find(path) for path in paths]
    method = "uniform grid" if all(_on_grid(path) for path in found) else OURS
    settings = {"checkpoints": [checkpoints.identity(path) for path in found]}

    def student(path: Path, dtype: torch.dtype) -> Student:
        machine = Machine(work.machine.device, dtype, work.machine.micro_batch)
        model, manifest = checkpoints.load(path, teacher_of(path, work.folder), machine)
        return as_packed(model, checkpoints.layers_of(manifest), work.folder)

    makers = tuple(lambda dtype, path=path: student(path, dtype) for path in found)
    return Entry(f"{method}, trained", name, settings, makers)


def _on_grid(path: Path) -> bool:
    return path.is_dir() and all(isinstance(x.format, GroupGrid) for x in checkpoints.layers_of(read_manifest(path)))


def teacher_of(path: Path, folder: ModelFolder) -> ModelFolder:
    """The model by the fingerprint that the checkpoint knows it by: of its files, or the key of its artifact."""
    artifact = made_before(folder)
    return artifact if path.is_dir() and read_manifest(path).get("teacher") == artifact.fingerprint else folder


def size_of(layers: list[Layer], grids: dict[str, Grid], folder: ModelFolder) -> dict[str, float]:
    """Bits per weight and megabytes of grids, with 16 bits for all else.

    Mean bits are said of the MLP (`bits`), of all quantized layers (`bits_all`) and of the whole model (`bits_model`).
    """
    costs = [(layer.role, (layer.weights, grids[layer.name].bits_per_weight)) for layer in layers]
    mlp = mean_bits(cost for role, cost in costs if role == "mlp")
    whole = sum(parameter.numel() for parameter in folder.skeleton().parameters())
    rest = whole - sum(layer.weights for layer in layers)
    bits = sum(weights * bits for _, (weights, bits) in costs) + 16 * rest
    return sizes(mlp, mean_bits(cost for _, cost in costs), bits / whole, bits / 8)


def as_packed(model: PreTrainedModel, layers: list[Layer], folder: ModelFolder) -> Student:
    """A student as its packed file has it, embedding and head rounded where they are not quantized, and its sizes."""
    for layer in rounded(layers, folder.skeleton()):
        put(model, layer.name, writer.rounded(layer, model.get_parameter(f"{layer.name}.weight").cpu()))
    return model, our_size(layers, folder)


def our_size(layers: list[Layer], folder: ModelFolder) -> dict[str, float]:
    """As `size_of`, for formats of this package, whose megabytes are those of the packed file."""
    mlp, model = [layer for layer in layers if layer.role == "mlp"], folder.skeleton()
    whole = model_bits_per_weight(layers, model)
    return sizes(bits_per_weight(mlp), bits_per_weight(layers), whole, file_bytes(layers, model))


def stored_size(layers: list[Layer], stored: Stored) -> dict[str, float]:
    """As `size_of`, for files of a peer: `bits_all` is of the decoder's layers, megabytes are those of the files."""
    mlp = [f"{layer.name}.weight" for layer in layers if layer.role == "mlp"]
    every = [f"{layer.name}.weight" for layer in layers]
    return sizes(stored.bits(mlp), stored.bits(every), stored.bits(stored.parameter_bytes), stored.file_bytes)


def sizes(mlp: float, layers: float, model: float, bytes: float) -> dict[str, float]:
    """Mean bits and megabytes as a row has them."""
    bits = {"bits": mlp, "bits_all": layers, "bits_model": model}
    return {name: round(value, 4) for name, value in bits.items()} | {"megabytes": round(bytes / 1e6, 3)}


def digest(ids_NL: torch.Tensor) -> str:
    """A short name for exactly these tokens."""
    return hashlib.sha256(ids_NL.numpy().tobytes()).hexdigest()[:12]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What an `Evaluation` is made from."""
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--evaluation", nargs="+", default=[], help="files that nothing has seen")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each evaluation file")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both models' evaluation")
    parser.add_argument("--micro-batch", type=int, default=16)
