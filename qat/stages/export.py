"""Exports a checkpoint to another tool's format, and compares the two before the export is published."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from qat import checkpoints
from qat.artifacts import publish
from qat.config import Config
from qat.console import console
from qat.export import card, parity
from qat.export.card import ADAPTER
from qat.export.exporter import exporter
from qat.export.source import DTYPES, Source, open_source
from qat.runs import Run
from qat.stages.workspace import Workspace, open_workspace, start_folder

KIND = "export"


def main(config: Config, run: Run) -> None:
    """`stage=export`."""
    work = open_workspace(config, run)
    writer = importlib.import_module(f"qat.export.{config.export.format}.writer")
    folder = Path(str(config.export.output)).expanduser()
    form = exporter(config.export.format)
    with work.timed("export"):
        source = open_source(work.model, start_folder(config.checkpoint), config.export.merge)
        form.refuse_layers(checkpoints.entries(source.layers), config.export)
        form.refuse_adapters(source.adapted, config.export)
        if form.sized:
            source = replace(source, dtype=DTYPES[config.export.dtype], exact=config.export.dense)
        make(work, writer, source, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.result["quant"] = source.quant
    run.result["paths"]["export"] = str(folder)
    run.result["memory"]["export_bytes"] = size
    console.print(f"{folder}: {config.export.name}, {size / 1e6:.1f} MB", soft_wrap=True)


def make(work: Workspace, writer: ModuleType, source: Source, folder: Path) -> None:
    """Writes, compares and publishes; whatever goes wrong leaves an older export at `folder` untouched."""
    settings = work.config.export
    described: dict[str, Any] = {
        "kind": KIND,
        "format": settings.format,
        "model": source.teacher.name,
        "quant": source.quant,
    }
    with publish(folder, described) as (scratch, manifest):
        writer.write(source, scratch, settings)
        if source.adapters is not None:
            checkpoints.copy_adapters(source.adapters, scratch / ADAPTER)
        made = writer.read(source, scratch)
        form = exporter(settings.format)
        longest = settings.context if form.bounded else None
        rows = [row[:, :longest] for row in parity.prompts(source.teacher)[: form.samples]]
        error = parity.check(source.model, made, rows, writer.rounding(settings))
        manifest["parity"] = error
        work.run.result["metrics"]["parity"] = error
        said = f"Its logits differ from those of the checkpoint by {error:.1e} of their norm."
        card.write(source, scratch, settings, said)
