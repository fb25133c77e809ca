"""Formats of quantized weights, by name. A new one is a file here and a line below."""

from typing import Any

from qat.quant.formats.base import Format, Grid, Part, Parts
from qat.quant.formats.grid import Even
from qat.quant.formats.table import Table

__all__ = ["FORMATS", "Even", "Format", "Grid", "Part", "Parts", "Table", "of"]

FORMATS: dict[str, type[Format]] = {"table": Table, "grid": Even}


def of(settings: dict[str, Any]) -> Format:
    """The format that a manifest or a configuration describes; files older than the choice have tables."""
    made = {key: value for key, value in settings.items() if key != "format"}
    return FORMATS[settings.get("format", "table")](**made)
