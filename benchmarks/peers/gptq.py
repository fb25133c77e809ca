"""GPTQ (Frantar et al. 2022), by the package GPTQModel, which packs the indices; they are unpacked again here.

Columns go by activation within and among groups (`act_group_aware`, the package's default), so that groups
stay consecutive and no order has to be stored.
"""

import contextlib
import os
import re
import tempfile

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # its own guess starts no worker on a small machine

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from torch import Tensor

from peers.grid import Grid
from qat.models import ModelFolder

# The older format `gptq` stores zero points less one, and nothing here would add it again.
SETTINGS = {"grid": "asymmetric", "act_group_aware": True, "format": "gptq_v2"}
ROWS = 8  # forwarded at once


def quantize(folder: ModelFolder, grids: dict[str, Grid], calibration_NL: Tensor) -> dict[str, Tensor]:
    """The whole model, layer after layer, each seeing inputs from the quantized ones below it."""
    usual = max(grids.values(), key=list(grids.values()).count)
    others = {f"+:^{re.escape(n)}$": {"bits": g.bits, "group_size": g.group} for n, g in grids.items() if g != usual}
    settings = QuantizeConfig(
        bits=usual.bits,
        group_size=usual.group,
        sym=False,
        desc_act=False,
        act_group_aware=SETTINGS["act_group_aware"],
        dynamic=others or None,
        format=SETTINGS["format"],
        offload_to_disk=False,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    path = folder.path.resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves logs where it runs
        model = GPTQModel.load(str(path), settings, dtype=torch.bfloat16)
        rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration_NL]
        model.quantize(rows, batch_size=ROWS)
    with torch.no_grad():
        return {
            name: model.model.get_submodule(name).cpu().dequantize_weight().T.float().contiguous() for name in grids
        }
