"""Our presets against other quantizers at equal effective bits: KL to the teacher, as a table and a picture.

    pip install hqq auto-round datasets
    pip install --no-deps gptqmodel pypcre tokenicer logbar device-smi defuser torchao threadpoolctl
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --methods rtn hqq gptq autoround --bits 2:64 3:64 4:64
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --ours q2a4 q2a4_r8 q3a4_r8 q4a4 --convert fast --checkpoint q2a4=outputs/SR-001/checkpoints/best
    python benchmarks/quality.py --draw

`--bits 2:64` quantizes the MLP to 2 bits in groups of 64 consecutive inputs; attention always gets 4 bits in
groups of 64. Bits per weight are those of the MLP, with scales (16 bits), zero points (as each format stores
them) and, for ours, tables and low-rank scales. Everything that calibrates sees the same tokens; everything
is measured by one function on the same rows. No weight of a peer counts before every group of every layer was
found to hold no more values than its bits can tell apart, and to resemble the layer's own.

GPTQModel 7.7 asks for a newer torch than the one pinned here and works with it, so pip must not have its way.
Evaluation costs most on a CPU: `--precision bf16` is much faster there and reads slightly lower (docs/LOG.md). Four
bits in groups of 32 say nothing about SmolLM2 from the wheel, whose own weights lie on such a grid.

What is made is kept: weights under `--outputs`, figures in `--json`. A command that was stopped, or that is
given with more methods, does what is missing; a row is made anew when anything that shaped it has changed.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import uniform
from conversion import convert_option, convert_preset, texts
from peers import PEERS, Peer
from peers.grid import Grid, mean_bits, parse, prove
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from qat import checkpoints
from qat import machine as machines
from qat.artifacts import obtain, read_manifest, write_json
from qat.cache.reader import Text
from qat.checkpoint_files import find
from qat.config import InstanceConfig, ModelConfig, ModelSource, Precision, QuantConfig, TableConfig
from qat.errors import ArtifactError, ConfigError, QatError, UnavailableError
from qat.evaluate import evaluate
from qat.machine import DTYPES, Machine
from qat.models import ModelFolder, linear, locate
from qat.quant.convert import install
from qat.quant.layers import Layer, bits_per_weight, select

ATTENTION = (4, 64)
TOP_K = 64  # tokens that `kd_loss` looks at
OURS = "ours"
WEIGHTS = "weights.safetensors"
COLORS = {
    "RTN": "#9aa5b1",
    "HQQ": "#ca8a04",
    "GPTQ": "#0f766e",
    "AutoRound": "#7c3aed",
    "uniform grid, trained": "#111827",
}
OUR_COLORS = ("#c2410c", "#1d4ed8", "#be185d")


@dataclass(frozen=True)
class Entry:
    """One model to measure.

    Attributes:
        method: what the picture groups by: a peer's label, or ours and how it was made.
        name: which of the method's models: bits and group, preset, or what the checkpoint is called.
        settings: everything that shapes its weights, as JSON values.
        make: gives the student, in a compute type, and what the row says beside its figures.
    """

    method: str
    name: str
    settings: dict[str, Any]
    make: Callable[[torch.dtype], tuple[PreTrainedModel, dict[str, Any]]]


class Work:
    """What all entries share: the teacher, its texts and the machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        instance = InstanceConfig(name="auto", micro_batch=options.micro_batch)
        self.machine = machines.resolve(instance)
        self.folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
        self.outputs, self.precision = Path(options.outputs), DTYPES[Precision[options.precision]]
        self.calibration = texts(
            options.calibration, self.folder, options.length, options.calibration_tokens, options.shares
        )
        self.held_out = {
            Path(path).stem: texts([path], self.folder, options.length, options.tokens) for path in options.evaluation
        }
        self.calibrated = {"calibration": digest(self.calibration), "calibration_tokens": self.calibration.numel()}

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The teacher in fp32, in host memory."""
        return self.folder.load(torch.float32, torch.device("cpu"))

    @cached_property
    def teacher(self) -> "Remembered":
        """The teacher that students are measured against."""
        return Remembered(self.folder.load(self.precision, self.machine.device))

    def evaluate(self, student: PreTrainedModel, text: str) -> dict[str, float]:
        """Figures of a student on one text."""
        machine = Machine(self.machine.device, self.precision, self.machine.micro_batch)
        figures = evaluate(student, self.teacher, Text(self.held_out[text]), TOP_K, machine)
        return {
            "kl": figures.kl,
            "kd_loss": figures.kd_loss,
            "agreement": figures.top1_agreement,
            "perplexity": figures.perplexity,
            "teacher_perplexity": figures.teacher_perplexity,
        }


class Remembered:
    """A teacher that computes the hidden states of each batch once, however many students meet it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.lm_head, self._model = model.lm_head, model
        self._known: dict[str, torch.Tensor] = {}

    def base_model(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> BaseModelOutput:
        """The model without its head; states are kept in host memory."""
        key = digest(input_ids.cpu())
        if key not in self._known:
            self._known[key] = self._model.base_model(input_ids=input_ids, **inputs).last_hidden_state.cpu()
        return BaseModelOutput(self._known[key].to(input_ids.device))


def main() -> None:
    """Computes what is missing, then prints the table and draws the picture."""
    options = arguments()
    logging.basicConfig(level=logging.WARNING)
    results, skipped = Results(Path(options.json)), {}
    try:
        if not options.draw:
            work = Work(options)
            for entry in entries(work, options, skipped):
                measure(entry, work, results)
        rows = results.rows
    except QatError as error:
        raise SystemExit(f"quality.py: {error}") from None
    print(table(rows, skipped))
    if rows and importlib.util.find_spec("matplotlib"):
        draw(rows, Path(options.picture))
    else:
        print("\nno picture: there is nothing to draw, or no matplotlib to draw with (--draw does it elsewhere)")


def entries(work: Work, options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[Entry]:
    """Everything that was asked for; peers that cannot run here are told in `skipped`."""
    for name in options.methods:
        try:
            quantize, settings = PEERS[name].load()
        except UnavailableError as error:
            skipped[PEERS[name].label] = str(error)
            continue
        for text in options.bits:
            yield peer(work, PEERS[name], text, quantize, settings)
    for name in options.ours:
        yield preset(work, name, options.convert)
    for given in options.checkpoint:
        name, equals, path = given.partition("=")
        if not equals:
            raise ConfigError(f"--checkpoint {given} is not name=path")
        yield checkpoint(work, name, find(Path(path)))


def measure(entry: Entry, work: Work, results: "Results") -> None:
    """Adds an entry's rows, one a text, where they are not there already."""
    student = None
    for text, ids in work.held_out.items():
        settings = entry.settings | {
            "teacher": work.folder.fingerprint,
            "evaluation": digest(ids),
            "tokens": ids.numel(),
            "length": ids.shape[1],
            "precision": str(work.precision).removeprefix("torch."),
        }
        row = {"method": entry.method, "name": entry.name, "text": text, "settings": settings}
        if results.has(row):
            continue
        if student is None:
            student, told = entry.make(work.precision)
        row |= {**told, **work.evaluate(student, text)}
        results.add(row | {"device": work.machine.describe(), "date": time.strftime("%Y-%m-%d")})
        print(f"{entry.method} {entry.name} {text}: kl {row['kl']:.4f} at {row['bits']:.2f} bits", flush=True)


def peer(work: Work, peer: Peer, bits: str, quantize: Callable, settings: dict[str, Any]) -> Entry:
    """A peer's model: its dequantized weights in the teacher."""
    layers, mlp = layers_of(work.exact), peer.grid(*parse(bits))
    grids = {layer.name: mlp if layer.kind == "mlp" else peer.grid(*ATTENTION) for layer in layers}
    shaping = {"mlp": bits, "attention": "{}:{}".format(*ATTENTION), **settings}
    shaping |= work.calibrated if peer.calibrates else {}
    inputs = {"teacher": work.folder.fingerprint, "method": peer.label, **shaping}

    def fill(folder: Path) -> dict[str, Any]:
        began = time.monotonic()
        made = quantize(work.folder, grids, work.calibration)
        seconds = time.monotonic() - began
        save_file({name: weight.contiguous() for name, weight in made.items()}, folder / WEIGHTS)
        return {"seconds": round(seconds, 1)}

    def make(dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
        kept = obtain(work.outputs / "artifacts", "peers", f"{peer.label}-{bits.replace(':', 'g')}", inputs, fill)
        weights = load_file(kept.folder / WEIGHTS)
        levels = proved(work.exact, weights, layers, grids)
        student = work.folder.load(dtype, work.machine.device)
        with torch.no_grad():
            for name, weight in weights.items():
                linear(student, name).weight.copy_(weight)
        return student, {**bits_of(layers, grids), "levels": levels, "seconds": kept.manifest["seconds"]}

    return Entry(peer.label, bits, shaping, make)


def proved(
    exact: PreTrainedModel, weights: dict[str, torch.Tensor], layers: list[Layer], grids: dict[str, Grid]
) -> dict[str, int]:
    """The most values found in a group, by kind of layer.

    Raises:
        NumericsError: a layer's weight is not a quantized one, or not that layer's.
    """
    found: dict[str, int] = {}
    for layer in layers:
        levels = prove(layer.name, weights[layer.name], linear(exact, layer.name).weight, grids[layer.name])
        found[layer.kind] = max(found.get(layer.kind, 0), levels)
    return found


def bits_of(layers: list[Layer], grids: dict[str, Grid]) -> dict[str, float]:
    """Mean bits per weight of the MLP and of all quantized layers."""
    costs = [(layer.kind, (layer.weights, grids[layer.name].bits_per_weight)) for layer in layers]
    mlp = mean_bits(cost for kind, cost in costs if kind == "mlp")
    return {"bits": round(mlp, 4), "bits_all": round(mean_bits(cost for _, cost in costs), 4)}


def preset(work: Work, name: str, convert: str) -> Entry:
    """A preset of ours, converted and not trained."""
    settings = convert_option(convert)
    shaping = {"convert": {key: value for key, value in asdict(settings).items() if key != "calibration_tokens"}}

    def make(dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
        began = time.monotonic()
        made = convert_preset(name, work.folder, work.exact, work.calibration, settings, work.machine)
        seconds = time.monotonic() - began
        student = work.folder.load(dtype, work.machine.device)
        install(student, {one.layer.name: one.module for one in made})
        return student, {**our_bits([one.layer for one in made]), "seconds": round(seconds, 1)}

    return Entry(f"{OURS}, convert={convert}", name, shaping | work.calibrated, make)


def checkpoint(work: Work, name: str, path: Path) -> Entry:
    """A trained student of ours, or of `uniform.py`."""
    on_grid = path.is_dir() and str(read_manifest(path)["quant"]["name"]).startswith(uniform.NAME)

    def make(dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
        machine = Machine(work.machine.device, dtype, work.machine.micro_batch)
        student, manifest = checkpoints.load(path, teacher_of(path, work.folder), machine)
        layers = checkpoints.layers_of(manifest)
        if not on_grid:
            return student, our_bits(layers)
        return student, bits_of(layers, {layer.name: uniform.grid(layer) for layer in layers})

    method = "uniform grid" if on_grid else OURS
    return Entry(f"{method}, trained", name, {"checkpoint": checkpoints.identity(path)}, make)


def teacher_of(path: Path, folder: ModelFolder) -> ModelFolder:
    """The model by the fingerprint that the checkpoint knows it by: of its files, or the key of its artifact."""
    artifact = uniform.as_artifact(folder)
    known = path.is_dir() and read_manifest(path).get("teacher") == artifact.fingerprint
    return artifact if known else folder


def our_bits(layers: list[Layer]) -> dict[str, float]:
    """As `bits_of`, for tables with low-rank scales."""
    mlp = [layer for layer in layers if layer.kind == "mlp"]
    return {"bits": round(bits_per_weight(mlp), 4), "bits_all": round(bits_per_weight(layers), 4)}


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Every layer that is quantized, MLP and attention; bits and rank are not theirs."""
    return select(model, QuantConfig("all", mlp=TableConfig(bits=2, rank=1), attn=TableConfig(bits=2, rank=1)))


def digest(ids_NL: torch.Tensor) -> str:
    """A short name for exactly these tokens."""
    return hashlib.sha256(ids_NL.numpy().tobytes()).hexdigest()[:12]


class Results:
    """Rows in a JSON file, written after each; one a method, name and text. Several commands may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows that are there now.

        Raises:
            ArtifactError: the file is not what this script writes.
        """
        try:
            rows = json.loads(self.path.read_text()) if self.path.exists() else []
            for row in rows:
                _place(row)
            return rows
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.path} does not hold rows of this script ({error!r}): mend or delete it"
            ) from None

    def has(self, row: dict[str, Any]) -> bool:
        """True where this row is there, made with the same settings."""
        return any(_place(old) == _place(row) and old["settings"] == row["settings"] for old in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Puts a row in, in place of an older one of the same method, name and text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, [old for old in self.rows if _place(old) != _place(row)] + [row])


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["name"], row["text"]


def table(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown: a line a model in order of bits, a column a text, then what could not run and why."""
    names = sorted({row["text"] for row in rows})
    lines = [
        f"| method | | bits on the MLP | {' | '.join(f'{name} KL' for name in names)} | values a group | seconds |",
        f"| --- | --- | --- |{' --- |' * len(names)} --- | --- |",
    ]
    models: dict[tuple[float, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["bits"], row["method"], row["name"]), {})[row["text"]] = row
    for (bits, method, name), by_text in sorted(models.items()):
        told = next(iter(by_text.values()))
        kl = " | ".join(f"{by_text[text]['kl']:.3f}" if text in by_text else "" for text in names)
        levels = ", ".join(f"{count} ({kind})" for kind, count in told.get("levels", {}).items())
        lines.append(f"| {method} | {name} | {bits:.2f} | {kl} | {levels} | {told.get('seconds', '')} |")
    return "\n".join([*lines, *(f"\n{label} was left out: {reason}" for label, reason in skipped.items())])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against effective bits, a panel a text: our presets as lines, peers as points."""
    from matplotlib.figure import Figure  # machines that only compute may lack it

    names = sorted({row["text"] for row in rows})
    figure = Figure(figsize=(5.5 * len(names), 5), dpi=120, layout="constrained")
    methods = sorted({row["method"] for row in rows}, key=lambda method: (method.startswith(OURS), method))
    ours = [method for method in methods if method.startswith(OURS)]
    colors = COLORS | dict(zip(ours, OUR_COLORS, strict=False))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, names, strict=True):
        for method in methods:
            members = [row for row in rows if (row["method"], row["text"]) == (method, text)]
            points = sorted((row["bits"], row["kl"], row["name"]) for row in members)
            if points:
                show(axes, points, method, colors[method])
        axes.set(xlabel="effective bits per MLP weight", title=text, yscale="log")
        for name in ("major", "minor"):
            getattr(axes.yaxis, f"set_{name}_formatter")("{x:g}")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL(teacher‖student), nats")
    panels[-1].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(axes: Any, points: list[tuple[float, float, str]], method: str, color: str) -> None:
    """One method: a line with names if it is ours, else points."""
    bits, kl, names = zip(*points, strict=True)
    if not method.startswith(OURS):
        axes.plot(bits, kl, linestyle="", marker="s", markersize=6, color=color, label=method)
        return
    axes.plot(bits, kl, marker="o", color=color, label=method)
    for x, y, name in zip(bits, kl, names, strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(-6, -10), ha="right", fontsize=7, color=color)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--calibration", nargs="+", help="files that methods may look at")
    parser.add_argument("--shares", nargs="+", type=float, help="of the calibration files; equal if not given")
    parser.add_argument("--evaluation", nargs="+", help="files that nothing has seen")
    parser.add_argument("--methods", nargs="+", default=[], choices=PEERS, help="peers")
    parser.add_argument("--bits", nargs="+", default=["2:64", "3:64", "4:64"], help="of the MLP, with the group")
    parser.add_argument("--ours", nargs="+", default=[], metavar="PRESET", help="options of conf/quant, converted")
    parser.add_argument("--convert", default="fast", help="an option of conf/convert")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="NAME=PATH", help="trained students")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each evaluation file")
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="of all calibration files")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both models' evaluation")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--outputs", default="outputs", help="where quantized weights are kept")
    parser.add_argument("--json", default="docs/quality.json", help="where figures are kept")
    parser.add_argument("--picture", default="docs/quality.png")
    parser.add_argument("--draw", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.draw and not (options.model and options.calibration and options.evaluation):
        parser.error("--model, --calibration and --evaluation are needed, or --draw")
    return options


if __name__ == "__main__":
    main()
