"""Formats of quantized weights, by name. A new one is a file here and a line below."""

from typing import Any

from qat.quant.formats.base import Cluster, Equations, Fitted, Format, Grid, Misfit, Part, Parts, Product
from qat.quant.formats.codebook import Codebook
from qat.quant.formats.grid import GroupGrid
from qat.quant.formats.kquant import KQuant
from qat.quant.formats.vector import Vector

__all__ = [
    "FORMATS",
    "Cluster",
    "Codebook",
    "Equations",
    "Fitted",
    "Format",
    "Grid",
    "GroupGrid",
    "KQuant",
    "Misfit",
    "Part",
    "Parts",
    "Product",
    "Vector",
    "of",
]

FORMATS: dict[str, type[Format]] = {
    Codebook.name: Codebook,
    GroupGrid.name: GroupGrid,
    KQuant.name: KQuant,
    Vector.name: Vector,
}


def of(settings: dict[str, Any]) -> Format:
    """The format that a manifest or a configuration describes; files without a format's name have codebooks."""
    return FORMATS[settings.get("format", Codebook.name)].of(settings)
