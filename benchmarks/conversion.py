"""How good a conversion is before any training: KL to the teacher on text that calibration never saw.

    python benchmarks/conversion.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --presets q2a4 q2a4_r8 q3a4_r8 q4a4

Prints one row a preset and evaluation text, and writes the same as JSON with `--json`.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from qat import machine as machines
from qat.cache.batch import Batch, Text
from qat.cli import arguments as command_line
from qat.cli import main as launch
from qat.config import (
    ConvertConfig,
    DataConfig,
    DataSource,
    InstanceConfig,
    KMeansBackend,
    KMeansConfig,
    ModelConfig,
    ModelSource,
    Packing,
    QuantConfig,
)
from qat.conversion.convert import Converted, Held, Shelf, convert, install
from qat.conversion.costs import costs
from qat.data import packing, sources
from qat.data.documents import Document
from qat.data.tally import Tally
from qat.evaluate import evaluate
from qat.models import ModelFolder, locate
from qat.quant import budget
from qat.quant.architectures import Layer, select
from qat.quant.budget import Costs
from qat.quant.formats import Format
from qat.quant.places import matrix
from qat.quant.size import bits_per_weight

CONF = Path(__file__).parent.parent / "conf"
KMEANS = KMeansConfig("exact", KMeansBackend.exact)

Choices = list[tuple[Layer, list[Format]]]  # layers of a budget, and the formats that each may have


def main() -> None:
    """Calibrates once, converts and evaluates every preset."""
    options = arguments()
    machine = machines.resolve(InstanceConfig(name="auto", micro_batch=options.micro_batch))
    folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
    teacher = folder.load(torch.float32, machine.device)
    calibration = texts(options.calibration, folder, options.length, options.calibration_tokens, options.shares)
    held_out = {path: texts([path], folder, options.length, options.evaluation_tokens) for path in options.evaluation}
    print(f"calibration: {calibration.numel()} tokens; {machine.describe()}")
    rows = []
    for name in options.presets:
        rows += measure(name, folder, teacher, calibration, held_out, options, machine)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1))


def measure(name, folder, teacher, calibration, held_out, options, machine) -> list[dict]:
    """One preset: seconds of the whole conversion, effective bits and figures on each text."""
    settings = convert_option(options.convert)
    settings.sweeps = settings.sweeps if options.sweeps is None else options.sweeps
    settings.rounds = settings.rounds if options.rounds is None else options.rounds
    began = time.monotonic()
    made = Converter(folder, teacher, calibration, settings, machine).convert(preset(name))
    seconds = time.monotonic() - began
    student = folder.load(torch.float32, machine.device)
    install(student, {one.layer.name: one.module for one in made})
    exact = machines.Machine(machine.device, torch.float32, machine.micro_batch)
    mlp = bits_per_weight([one.layer for one in made if one.layer.role == "mlp"])
    rows = []
    for path, ids in held_out.items():
        figures = evaluate(student, teacher, Text(ids), 64, exact)
        row = {"preset": name, "bits": round(mlp, 3), "text": Path(path).stem, "seconds": round(seconds, 1)}
        row |= {"kl": figures.kl, "kd_loss": figures.kd_loss, "agreement": figures.top1_agreement}
        row |= {"perplexity": figures.perplexity, "teacher_perplexity": figures.teacher_perplexity}
        rows.append(row)
        print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return rows


@dataclass
class Converter:
    """Converts a model by `quant` options, each calibrated on the same rows of tokens.

    Attributes:
        folder: of the teacher.
        teacher: its weights, fp32.
        calibration_NL: rows of tokens.
        settings: how fits are done.
        machine: computes.
    """

    folder: ModelFolder
    teacher: PreTrainedModel
    calibration_NL: torch.Tensor
    settings: ConvertConfig
    machine: machines.Machine
    _costs: list[tuple[Choices, Costs]] = field(default_factory=list)

    def convert(self, quant: QuantConfig) -> list[Converted]:
        """Every layer as an option has it, or as a budget chooses."""
        layers = self.layers(quant)
        held = [Held() for _ in range(self.settings.passes)]

        def load(shelf: Shelf | None) -> PreTrainedModel:
            model = self._load()
            install(model, {layer.name: shelf.get(layer) for layer in layers} if shelf else {})
            return model

        figures = convert(layers, load, self._weight, self._text, self.settings, KMEANS, self.machine.device, held)
        return [Converted(layer, held[-1].get(layer), figures[layer.name]) for layer in layers]

    def layers(self, quant: QuantConfig) -> list[Layer]:
        """The layers that an option covers, with their formats."""
        layers = select(self.teacher, quant)
        if not quant.candidates:
            return layers
        choices = [(layer, budget.formats_of(layer, quant)) for layer in layers]
        return budget.chosen(quant, layers, self.teacher, self._known(choices))

    def _known(self, choices: Choices) -> Costs:
        """What formats cost, which budgets of any size share."""
        found = [costs for known, costs in self._costs if known == choices]
        if not found:
            device = self.machine.device
            found = [costs(choices, lambda _: self._load(), self._weight, self._text, self.settings, KMEANS, device)]
            self._costs.append((choices, found[0]))
        return found[0]

    def _load(self) -> PreTrainedModel:
        return self.folder.load(self.machine.dtype, self.machine.device)

    def _weight(self, name: str) -> torch.Tensor:
        return matrix(self.teacher, name)

    @property
    def _text(self) -> list[Batch]:
        return Text(self.calibration_NL).batches(self.machine.micro_batch)


def texts(
    paths: list[str], folder: ModelFolder, length: int, tokens: int, shares: list[float] | None = None
) -> torch.Tensor:
    """Token ids [N, length] from files (`.json` Alpaca rows, else text), by these shares or equal ones."""
    tokenizer, parts = folder.tokenizer(), []
    for path, share in zip(paths, shares or [1.0] * len(paths), strict=True):
        source = DataSource.alpaca if path.endswith(".json") else DataSource.text
        wanted = int(tokens * share / sum(shares or [1.0] * len(paths)))
        found, documents = 0, []
        data = DataConfig(name="file", source=source, path=path)
        for origin, ids in sources.render(data, tokenizer, Tally.of(data)):
            documents.append(Document(origin, ids))
            found += len(ids)
            if found >= wanted:
                break
        parts.append(packing.pack(documents, length, Packing.joined, 0).input_ids[: wanted // length])
    return torch.cat(parts).long()


def convert_option(name: str) -> ConvertConfig:
    """A `convert` option as the command line would compose it."""
    return ConvertConfig(**yaml.safe_load((CONF / "convert" / f"{name}.yaml").read_text()))


def preset(words: str) -> QuantConfig:
    """A `quant` option as the command line would compose it, with further words of it: `budget quant.megabytes=66`."""
    return launch.check(command_line.parse(f"quant={words}".split())).configs[0].quant


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--shares", nargs="+", type=float, help="of the calibration files; equal if not given")
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", default=["q2a4", "q2a4_r8", "q3a4_r8", "q4a4"])
    parser.add_argument("--calibration-tokens", type=int, default=64_000)
    parser.add_argument("--evaluation-tokens", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--convert", default="thorough", help="an option of conf/convert")
    parser.add_argument("--rounds", type=int, help="in place of the option's own")
    parser.add_argument("--sweeps", type=int, help="in place of the option's own")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
