import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from qat import checkpoints
from qat.checkpoints.adapters import CONFIG, FILE
from qat.config import ModeConfig, TrainConfig
from qat.quant.adapter import adapters
from qat.quant.linear import quantized
from tests import tiny
from tests.distill.test_trainer import TRAIN, steps_of, trainer_of

LORA = ModeConfig(name="lora", mlp=True, attn=True, rank=3, alpha=6.0)


def test_x(student, readers, teacher, checkpoint, tmp_path):
    trainer = trainer_of(student, readers, mode=LORA, micro_batch=5)
    figures = steps_of(trainer, 3)
    print(figures)
    folder = tmp_path / "c"
    manifest = checkpoints.manifest(checkpoint, teacher, tiny.FP32)
    checkpoints.save(student, folder, checkpoints.heritage(manifest))
    print((folder / CONFIG).read_text())
    print(list(load_file(folder / FILE))[:4])
    again, _ = checkpoints.load(folder, teacher, tiny.FP32)
    ids = torch.arange(60).reshape(3, 20)
    assert torch.equal(again(ids).logits, student(ids).logits)
