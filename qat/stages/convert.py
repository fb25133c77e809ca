"""Stage 2: the teacher's weights to tables and scales."""

from pathlib import Path
from typing import Any

import torch

from qat import checkpoints, plots
from qat.artifacts import Artifact, obtain
from qat.cache.reader import CacheReader
from qat.config import Config, as_plain
from qat.console import console, table
from qat.quant.convert import convert
from qat.quant.layers import KINDS, Layer, bits_per_weight, select, summary
from qat.quant.linear import QuantLinear
from qat.quant.moments import second_moments
from qat.runs import Run
from qat.stages import cache
from qat.stages.workspace import Workspace, open_workspace

WORST = 3  # layers named


def main(config: Config, run: Run) -> None:
    """`stage=convert`."""
    work = open_workspace(config, run)
    make(work, cache.make(work))


def make(work: Workspace, outputs: Artifact) -> Artifact:
    """The quantized model before any training, from `outputs/artifacts` when it is already there."""
    config = work.config
    inputs = {
        "teacher": work.teacher.fingerprint,
        "cache": outputs.key,
        "quant": as_plain(config.quant),
        "kmeans": config.kmeans.backend.name,
        "convert": as_plain(config.convert),
    }
    name = f"{work.teacher.name}_{config.quant.name}_init"
    with work.timed("convert"):
        made = obtain(work.artifacts, "checkpoints", name, inputs, lambda folder: _convert(work, outputs, folder))
    layers = checkpoints.layers_of(made.manifest)
    work.run.result["quant"] = {"preset": config.quant.name, **summary(layers)}
    work.run.result["paths"]["conversion"] = str(made.folder)
    _show(layers, made.manifest["figures"])
    _draw(work, made.manifest["figures"])
    return made


def _convert(work: Workspace, outputs: Artifact, folder: Path) -> dict[str, Any]:
    config = work.config
    model = work.teacher.load(work.machine.dtype, work.machine.device)
    layers = select(model, config.quant)
    reader = CacheReader(outputs, "train")
    rows = reader.input_ids(max(1, config.convert.calibration_tokens // int(reader.meta["length"])))
    sources = list(dict.fromkeys(layer.source for layer in layers))
    moments = second_moments(model, sources, rows, work.machine.micro_batch)
    figures: dict[str, dict[str, float]] = {}
    modules: dict[str, QuantLinear] = {}

    def done(layer: Layer, module: QuantLinear, errors: dict[str, float]) -> None:
        modules[layer.name], figures[layer.name] = module, errors

    del model
    exact = work.teacher.load(torch.float32, work.machine.device)  # whatever the forward pass ran in
    convert(exact, layers, moments, config.convert, config.kmeans, done)
    checkpoints.write_tables({layer.name: modules[layer.name] for layer in layers}, folder)
    return {**checkpoints.describe(work.teacher, config.quant, layers), "figures": figures}


def _draw(work: Workspace, figures: dict[str, dict[str, float]]) -> None:
    """Names the layers with the largest errors and draws all of them."""
    errors = {name: entry["output_error"] for name, entry in figures.items()}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
    console.print(f"largest output errors: {', '.join(f'{name} {errors[name]:.3f}' for name in worst)}", soft_wrap=True)
    picture = work.run.folder / "conversion.png"
    plots.error_by_depth(errors, f"{work.teacher.name}, {work.config.quant.name}: before training", picture)
    work.run.result["paths"]["conversion_errors"] = str(picture)


def _show(layers: list[Layer], figures: dict[str, dict[str, float]]) -> None:
    """One row a kind of layer."""
    rows = []
    for kind in KINDS:
        members = [layer for layer in layers if layer.kind == kind]
        if not members:
            continue
        mean = {key: sum(figures[m.name][key] for m in members) / len(members) for key in figures[members[0].name]}
        bits = f"{bits_per_weight(members):.2f}"
        seconds = f"{mean['seconds'] * len(members):.1f}"
        rows.append(
            [
                kind,
                str(len(members)),
                bits,
                f"{mean['weight_error']:.4f}",
                f"{mean['output_error']:.4f}",
                seconds,
            ]
        )
    counts = " + ".join(f"{row[1]} {'MLP' if row[0] == 'mlp' else 'attention'}" for row in rows)
    header = ["kind", "layers", "bits/weight", "weight error", "output error", "seconds"]
    table(f"{len(layers)} layers converted ({counts})", header, rows)
