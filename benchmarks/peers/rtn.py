"""Round to nearest: each group's own range, cut into even steps, with an integer zero point."""

import torch
from torch import Tensor

from peers.grid import Grid
from qat.models import ModelFolder
from qat.quant.places import matrix

SETTINGS = {"grid": "asymmetric, minimum to maximum"}


def quantize(folder: ModelFolder, grids: dict[str, Grid], calibration_NL: Tensor) -> dict[str, Tensor]:
    """Every layer on its own; text changes nothing."""
    model = folder.load(torch.float32, torch.device("cpu"))
    return {name: round_to_nearest(matrix(model, name), grid) for name, grid in grids.items()}


def round_to_nearest(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The nearest values [O, I] of each group's grid, which holds zero; scales are rounded to fp16 first."""
    groups, top = weight_OI.reshape(-1, grid.group), 2**grid.bits - 1
    low, high = (groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0))
    scale = ((high - low) / top).half().float().clamp_min(torch.finfo(torch.float16).tiny)
    zero = (-low / scale).round().clamp(0, top)
    index = ((groups / scale).round() + zero).clamp(0, top)
    return ((index - zero) * scale).view(weight_OI.shape)
