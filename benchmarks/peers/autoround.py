"""AutoRound (Cheng et al. 2023), by its own package: rounding and ranges learn by signed gradients, block by block.

The weights are taken from the model in memory. A saved `format="fake"` may hold the weights of an fp32
checkpoint again, unquantized; so the model is loaded in bf16, and what comes out is put back exactly onto
the grid of its scales, from which bf16 had moved it a little.
"""

import torch
from auto_round import AutoRound
from torch import Tensor, nn

from peers.grid import Grid
from qat.models import ModelFolder

SETTINGS = {"grid": "asymmetric", "iterations": 50, "lr": 5e-3}  # the package's recipe `auto-round-light`
BATCH = 8


def quantize(folder: ModelFolder, grids: dict[str, Grid], calibration_NL: Tensor) -> dict[str, Tensor]:
    """The whole model, each block seeing inputs from the quantized ones below it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = folder.load(torch.bfloat16, device).requires_grad_(True)
    usual = max(grids.values(), key=list(grids.values()).count)
    method = AutoRound(
        model,
        folder.tokenizer(),
        scheme=f"W{usual.bits}A16",
        sym=False,
        group_size=usual.group,
        layer_config={name: {"bits": g.bits, "group_size": g.group, "sym": False} for name, g in grids.items()},
        iters=SETTINGS["iterations"],
        lr=SETTINGS["lr"],
        dataset=[_row(row[None]) for row in calibration_NL],
        nsamples=len(calibration_NL),
        seqlen=calibration_NL.shape[1],
        batch_size=BATCH,
        device_map=device.type,
        enable_torch_compile=device.type == "cuda",
    )
    quantized = method.quantize()[0]
    with torch.no_grad():
        return {name: _exact(quantized.get_submodule(name), grid) for name, grid in grids.items()}


def _row(ids_1L: Tensor) -> dict[str, Tensor]:
    """A calibration row. Nothing follows the last position, so it may be masked; a mask of ones would be dropped."""
    mask = torch.ones_like(ids_1L)
    mask[:, -1] = 0
    return {"input_ids": ids_1L, "attention_mask": mask}


def _exact(layer: nn.Linear, grid: Grid) -> Tensor:
    """The weight [O, I] fp32 as whole multiples of each group's scale."""
    scale = layer.scale.float().cpu().reshape(-1, 1)
    return ((layer.weight.float().cpu().reshape(-1, grid.group) / scale).round() * scale).view(layer.weight.shape)
