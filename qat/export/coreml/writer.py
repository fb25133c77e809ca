"""The package, the numbers that it is to give, and the script that compares them."""

import json
import logging
import shutil
from pathlib import Path

import coremltools as ct
import numpy as np
import torch

from qat.config import ExportConfig, ScaleForm
from qat.export.coreml import check
from qat.export.coreml.interpreter import Interpreted
from qat.export.coreml.program import Decoder, counts
from qat.export.parity import prompts
from qat.export.source import Source, copy_tokenizer, require_codebooks
from qat.quant.embedding import restore
from qat.quant.linear import baked

log = logging.getLogger(__name__)

PACKAGE = "model.mlpackage"


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes the package, the numbers it is to give, the script that compares them, and the tokenizer.

    Raises:
        ConfigError: scales are to stay apart, and a layer is no codebook.
        UnavailableError: an architecture with operations of its own.
        NumericsError: a value does not fit into fp16.
    """
    factored = settings.scales is ScaleForm.factored
    if factored:
        require_codebooks(source, "export=coreml export.scales=factored")
    restore(source.model)
    with torch.no_grad():
        program = Decoder(source.model, settings.context, factored).program()
    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    model.save(str(folder / PACKAGE))
    _record(source, folder, settings)
    operations = counts(model._mil_program)
    size = sum(file.stat().st_size for file in (folder / PACKAGE).rglob("*") if file.is_file())
    report = {"scales": settings.scales.name, "context": settings.context, "operations": operations, "bytes": size}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.info("%d operations, %.1f MB", sum(operations.values()), size / 1e6)
    copy_tokenizer(source.teacher, folder)


def _record(source: Source, folder: Path, settings: ExportConfig) -> None:
    ids = prompts(source.teacher)[0][:, : settings.context]
    with torch.inference_mode(), baked(source.model, torch.float32):
        logits = source.model(ids).logits[0].half().numpy()
    np.savez(folder / "reference.npz", input_ids=ids[0].numpy(), logits=logits, context=settings.context)
    shutil.copyfile(str(check.__file__), folder / "check.py")


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to."""
    return torch.float16


def read(source: Source, folder: Path) -> Interpreted:
    """The package as a model, computed with numpy."""
    return Interpreted(folder / PACKAGE)
