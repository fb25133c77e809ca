"""Stage 2: converts weights to a format of few bits, from the model or from a checkpoint in another format."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import checkpoints, manifests, plots
from qat.artifacts import Artifact, obtain, require
from qat.cache.reader import CacheReader
from qat.config import ROLES, Config
from qat.console import console, facts, table
from qat.conversion.convert import convert
from qat.evaluate import Metrics, evaluate
from qat.peaks import CONVERSION, FIGURES, peaks
from qat.quant.architectures import Layer, recorded, select, told
from qat.quant.size import bits_per_weight, said, summary
from qat.runs import Run
from qat.shaping import shaping
from qat.stages import cache, choice
from qat.stages.onward import onward
from qat.stages.source import Source, calibration
from qat.stages.workspace import Workspace, open_workspace, start_folder

WORST = 3  # number of layers with the largest errors that are named in the output


def main(config: Config, run: Run) -> None:
    """`stage=convert`."""
    work = open_workspace(config, run)
    run.result["metrics"] |= asdict(metrics(make(work, cache.make(work))))
    facts({}, {"go on with": onward(config, run, "distill")})


def make(work: Workspace, cached: Artifact) -> Artifact:
    """The quantized model before any training, from `outputs/artifacts` when it is already there."""
    work = choice.make(work, cached)
    config = work.config
    start = start_folder(config.checkpoint)
    inputs = {
        "teacher": work.model.fingerprint,
        "cache": cached.key,
        "quant": recorded(config.quant),
        "kmeans": config.kmeans.backend.name,
        "convert": {key: value for key, value in shaping(config.convert).items() if key != "name"},
        "checkpoint": checkpoints.identity(start) if start else None,
    }
    if work.teacher is not work.model:  # whose figures it holds
        inputs["measured_against"] = work.teacher.fingerprint
    name = f"{work.model.name}_{config.quant.name}_init"
    with work.timed("convert"):
        made = obtain(
            work.artifacts,
            "checkpoints",
            name,
            inputs,
            lambda folder: _convert(work, cached, start, folder),
            resumable=True,
            at=work.machine.place(),
        )
    require(made, manifests.CONVERSION)
    work.run.uses("convert", made)
    layers = checkpoints.layers_of(made.manifest)
    work.run.result["quant"] = {"preset": config.quant.name, **summary(layers, work.model.skeleton())}
    # An absolute path, so that the run can be used as a checkpoint from any directory.
    work.run.result["paths"]["conversion"] = str(made.folder.absolute())
    _show(layers, made.manifest, work.run.result["quant"])
    if made.manifest["figures"]:  # there are no figures where every layer was kept
        _draw(work, made.manifest["figures"])
    return made


def metrics(conversion: Artifact) -> Metrics:
    """Reports how good a conversion is on held-out text."""
    return Metrics(**conversion.manifest["metrics"]["after"])


def _convert(work: Workspace, cached: Artifact, start: Path | None, folder: Path) -> dict[str, Any]:
    with peaks.phase(CONVERSION):
        source, shelf, layers, figures = _fitted(work, cached, start, folder)
    with peaks.phase(FIGURES):
        measured = _measure(work, cached, source, shelf, layers)
    shelf.complete()
    return {
        **checkpoints.describe(work.model, work.config.quant, layers),
        "figures": figures,
        "metrics": measured,
        "measured_on": CacheReader(cached, "eval").text_key(),
    }


def _fitted(
    work: Workspace, cached: Artifact, start: Path | None, folder: Path
) -> tuple[Source, checkpoints.Shelf, list[Layer], dict[str, dict[str, float]]]:
    """What was converted, where its layers are, which those are, and the figures of those that were fitted."""
    config = work.config
    source = Source(work, start)
    source.settle(CacheReader(cached, "train"))
    layers = select(work.model.skeleton(), config.quant)
    made_with = work.machine.made_with()
    shelf = checkpoints.Shelf(folder / checkpoints.FILE, layers, made_with)
    kept = {layer.name: same for layer in layers if (same := source.kept(layer))}
    for name, same in kept.items():
        shelf.put(name, same)
    fitted = [layer for layer in layers if layer.name not in kept]
    names = [f"pass{number}.safetensors" for number in range(1, config.convert.passes)]
    earlier = [checkpoints.Shelf(folder / name, fitted, made_with) for name in names]
    figures = convert(
        fitted,
        partial(source.load, layers=fitted),
        source.weight,
        calibration(work, cached),
        config.convert,
        config.kmeans,
        work.machine.device,
        [*earlier, shelf],
        folder,
    )
    for one in earlier:
        one.discard()
    source.write_own(layers, folder)
    choice.keep(work, folder)
    return source, shelf, layers, figures


def _measure(
    work: Workspace, cached: Artifact, source: Source, shelf: checkpoints.Shelf, layers: list[Layer]
) -> dict[str, dict[str, float] | None]:
    """KL from the teacher and the like on held-out text, before and after; a model is not away from itself before."""
    machine, held_out = work.machine, CacheReader(cached, "eval")
    teacher, top_k = _teacher(work, source, held_out), int(held_out.meta["top_k"])
    before = None
    if source.starts or work.teacher is not work.model:
        student = source.load(None)
        before = asdict(evaluate(student, teacher, held_out, top_k, machine))
        del student
    student = source.load(shelf, layers)
    return {"before": before, "after": asdict(evaluate(student, teacher, held_out, top_k, machine))}


def _teacher(work: Workspace, source: Source, held_out: CacheReader) -> PreTrainedModel:
    """What figures are against: the model as it was, or another one."""
    if work.teacher is work.model:
        return source.original
    teacher = work.teacher.stream(work.machine.dtype, work.machine.device)
    work.settle(work.teacher, held_out, teacher)
    return teacher


def _draw(work: Workspace, figures: dict[str, dict[str, float]]) -> None:
    """Names the layers with the largest errors and draws all of them."""
    errors = {name: entry["output_error"] for name, entry in figures.items()}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
    console.print("largest output errors")
    for name in worst:
        console.print(f"  {errors[name]:.3f}  {name}", soft_wrap=True)
    picture = work.run.folder / "conversion.png"
    plots.error_by_depth(errors, f"{work.model.name}, {work.config.quant.name}: before training", picture)
    work.run.result["paths"]["conversion_errors"] = str(picture)


def _show(layers: list[Layer], manifest: dict[str, Any], quant: dict[str, Any]) -> None:
    """One row a role, what of the decoder is in none, then what the conversion did to the model."""
    figures, rows, counts = manifest["figures"], [], []
    for role in ROLES:
        members = [layer for layer in layers if layer.role == role]
        if members:
            counts.append(f"{len(members)} {role}")
            rows.append([role, str(len(members)), f"{bits_per_weight(members):.2f}", *_figures(members, figures)])
    header = ["role", "layers", "bits/weight", "weight error", "output error", "seconds"]
    table(f"{len(layers)} layers converted ({' + '.join(counts)})", header, rows)
    console.say(f"size, packed: {said(quant)}")
    if quant["dense"]:
        console.say(f"left dense, as shares of the decoder's weights: {told(quant['dense'])}")
    before, after = manifest["metrics"]["before"] or {"kd_loss": 0.0, "kl": 0.0}, manifest["metrics"]["after"]
    names = {"kd_loss": "KD loss (held-out)", "kl": "full KL (held-out)"}
    changes = [[name, f"{before[key]:.4f}", f"{after[key]:.4f}"] for key, name in names.items()]
    table("distance from the teacher", ["", "before conversion", "after"], changes)


def _figures(members: list[Layer], figures: dict[str, dict[str, float]]) -> list[str]:
    """Mean errors and all seconds of some layers; those taken over as they were have none."""
    fitted = [figures[layer.name] for layer in members if layer.name in figures]
    if not fitted:
        return ["kept", "kept", "-"]
    weight, output, seconds = (
        sum(entry[key] for entry in fitted) for key in ("weight_error", "output_error", "seconds")
    )
    return [f"{weight / len(fitted):.4f}", f"{output / len(fitted):.4f}", f"{seconds:.1f}"]
