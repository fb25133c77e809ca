"""Weights for other tools."""

import pkgutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from qat.config.keys import key

EXPORTERS = Path(__file__).resolve().parents[1] / "export"
FORMATS = tuple(sorted(found.name for found in pkgutil.iter_modules([str(EXPORTERS)]) if found.ispkg))


class ExportType(Enum):
    """The type of exported numbers."""

    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"


class ScaleForm(Enum):
    """How Core ML is given the scales of a codebook."""

    factored = "codebooks stay packed, one product for all ranks"
    baked = "multiplied out with the codebook to dense weights"


@dataclass
class ExportConfig:
    """Format and folder of `stage=export`."""

    name: str = MISSING
    format: str = key(MISSING, "what writes it, a package in qat/export/", words=FORMATS)
    dtype: ExportType = key(ExportType.fp32, "of dense weights; packed: of unquantized parts; anemll_v2: fp16 snaps")
    dense: bool = key(
        False,
        "gguf: layers in no type of llama.cpp keep export.dtype; packed: embedding and head do, if not quantized",
    )
    merge: bool = key(False, "hf: adapters are added to weights; else they lie beside, in adapter/, as PEFT reads them")
    scales: ScaleForm = key(ScaleForm.factored, "coreml")
    context: int = key(512, "coreml: tokens that the key-value cache holds", low=1)
    output: str | None = key(None, "a new folder, or an older export to replace")
