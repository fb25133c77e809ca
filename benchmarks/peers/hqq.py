"""HQQ (Badri & Shaji 2023), by its own package: zero points fitted to a sparse error, without text."""

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from peers.grid import Grid
from qat.models import ModelFolder
from qat.quant.places import matrix

SETTINGS = {"axis": 1}


def quantize(folder: ModelFolder, grids: dict[str, Grid], calibration_NL: Tensor) -> dict[str, Tensor]:
    """Every layer on its own, with scales and zero points rounded to the fp16 they are stored in."""
    model = folder.load(torch.float32, torch.device("cpu"))
    return {name: _layer(matrix(model, name).data, grid) for name, grid in grids.items()}


def _layer(weight_OI: Tensor, grid: Grid) -> Tensor:
    packed, stored = Quantizer.quantize(
        weight_OI, nbits=grid.bits, group_size=grid.group, axis=SETTINGS["axis"], device="cpu"
    )
    stored |= {name: stored[name].half().float() for name in ("scale", "zero")}
    return Quantizer.dequantize(packed, {**stored, "compute_dtype": torch.float32})
