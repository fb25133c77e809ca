"""Exports a checkpoint to another tool's format, and compares the two before the export is published."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from qat import checkpoints
from qat.artifacts import publish
from qat.config import Config, ExportConfig
from qat.console import facts
from qat.export import card, parity
from qat.export.card import ADAPTER, CARD
from qat.export.exporter import exporter
from qat.export.source import DTYPES, Source, open_source
from qat.models import ModelFolder
from qat.peaks import EXPORT, peaks
from qat.runs import Run
from qat.shown import near
from qat.stages.workspace import open_workspace, start_folder

KIND = "export"


def main(config: Config, run: Run) -> None:
    """`stage=export`."""
    work = open_workspace(config, run)
    with work.timed("export"), peaks.phase(EXPORT):
        quant, error = write(config.export, work.model, start_folder(config.checkpoint))
    folder = place(config.export)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.result["quant"] = quant
    run.result["metrics"]["parity"] = error
    run.result["paths"]["export"] = str(folder)
    run.result["memory"]["export_bytes"] = size
    facts({"written": f"{config.export.name}, {size / 1e6:.1f} MB"}, {"how to use it": near(folder / CARD)})


def place(settings: ExportConfig) -> Path:
    """The folder of an export."""
    return Path(str(settings.output)).expanduser()


def write(settings: ExportConfig, model: ModelFolder, checkpoint: Path | None) -> tuple[dict[str, Any], float]:
    """Writes, compares and publishes; whatever goes wrong leaves an older export untouched.

    Args:
        settings: format and folder.
        model: what the checkpoint is of.
        checkpoint: a student's; None exports the model.

    Returns:
        What `result.json` says of the quantization, and the largest error of logits as a share of their norm.

    Raises:
        ConfigError: the format holds no such layers.
        ArtifactError: the checkpoint is damaged or of another teacher, or what was written says something else.
    """
    writer = importlib.import_module(f"qat.export.{settings.format}.writer")
    form = exporter(settings.format)
    source = open_source(model, checkpoint, settings.merge)
    form.refuse_layers(checkpoints.entries(source.layers), settings)
    form.refuse_adapters(source.adapted, settings)
    if form.sized:
        source = replace(source, dtype=DTYPES[settings.dtype], exact=settings.dense)
    described: dict[str, Any] = {
        "kind": KIND,
        "format": settings.format,
        "model": model.name,
        "quant": source.quant,
    }
    with publish(place(settings), described) as (scratch, manifest):
        writer.write(source, scratch, settings)
        if source.adapters is not None:
            checkpoints.copy_adapters(source.adapters, scratch / ADAPTER)
        error = manifest["parity"] = _compared(writer, source, scratch, settings)
        said = f"Its logits differ from those of the checkpoint by {error:.1e} of their norm."
        card.write(source, scratch, settings, said)
    return source.quant, error


def _compared(writer: ModuleType, source: Source, made: Path, settings: ExportConfig) -> float:
    """The largest error of logits; what was read back is gone at the end, and with it the hold on its files."""
    form = exporter(settings.format)
    longest = settings.context if form.bounded else None
    rows = [row[:, :longest] for row in parity.prompts(source.teacher)[: form.samples]]
    return parity.check(source.model, writer.read(source, made), rows, writer.rounding(settings))
