"""The uniform grid: what is fixed stays fixed through fit and training, and what learns gets better."""

from copy import deepcopy

import evaluation
import pytest
import torch
import uniform
from peers.grid import levels

from qat import checkpoints
from qat.cache.batch import Text
from qat.cache.reader import CacheReader
from qat.config import ConvertConfig, LearnConfig, LossKind, ModeConfig, TrainConfig
from qat.convert.convert import install
from qat.distill import parameters
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.evaluate import evaluate
from qat.quant.linear import quantized
from tests import tiny

GROUP = 32


@pytest.fixture(scope="module")
def layers(teacher):
    return uniform.on_grid(teacher.load(torch.float32, tiny.CPU), (2, GROUP), (4, GROUP))


@pytest.fixture(scope="module")
def made(teacher, cache, layers):
    rows, model = CacheReader(cache, "train").input_ids(16), teacher.load(torch.float32, tiny.CPU)
    settings = ConvertConfig("small", gradients=True, passes=2, rounds=4, sweeps=1)
    return uniform.converted(layers, teacher, model, rows, settings, tiny.FP32)


def student_of(teacher, made):
    student = teacher.load(torch.float32, tiny.CPU)
    install(student, {one.layer.name: deepcopy(one.module) for one in made})
    return student


def test_every_weight_is_a_multiple_of_its_groups_scale(made):
    for one in made:
        weight = one.module.weight(torch.float32)
        steps = torch.arange(2**one.layer.bits) - (2**one.layer.bits - 1) / 2
        assert torch.equal(one.module.lut, steps)
        groups = weight.view(-1, GROUP)
        scale = one.module.scale_A * one.module.rank_magnitude @ one.module.scale_B
        scale = scale.view(-1, GROUP)
        assert torch.allclose(scale, scale[:, :1].expand_as(scale), rtol=1e-5)
        assert torch.allclose(groups, steps[one.module.indices.view(-1, GROUP).long()] * scale, rtol=1e-5)


def test_the_fit_beats_nearest_values_on_fitted_scales(teacher, cache, layers, made):
    held_out, model = Text(CacheReader(cache, "eval").input_ids(8)), teacher.load(torch.float32, tiny.CPU)
    plain = teacher.load(torch.float32, tiny.CPU)
    with torch.no_grad():
        for layer in layers:
            weight = plain.get_submodule(layer.name).weight
            tables = uniform.start(weight[None], layer.bits, layer.rank)
            index = uniform.assign.nearest(weight[None], tables.scale(), tables.table_NK)
            weight.copy_(uniform.scales.look_up(tables.table_NK, index)[0] * tables.scale()[0])
    fitted, nearest = (evaluate(x, model, held_out, 8, tiny.FP32).kl for x in (student_of(teacher, made), plain))
    assert fitted < 0.8 * nearest


def test_training_moves_scales_and_indices_and_nothing_else(teacher, cache, made):
    student = student_of(teacher, made)
    modules = quantized(student)
    checkpoints.native.add_latents(student, {}, teacher)
    before = {
        name: [getattr(m, part).clone() for part in ("lut", "scale_B", "rank_magnitude", "scale_A", "indices")]
        for name, m in modules.items()
    }
    train = TrainConfig(steps=20, batch_size=8, lr=1e-2, learn=LearnConfig(scales=1.0, codebooks=0.0, latent=0.2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "KINDS", parameters.KINDS | uniform.TRAINED)
        readers = CacheReader(cache, "train"), CacheReader(cache, "eval")
        kinds = {one.layer.name: (one.layer.kind, modules[one.layer.name]) for one in made}
        loss = Loss(LossKind.bucket_kl, 1.0, 0.0, None)
        trainer = Trainer(student, kinds, readers, train, ModeConfig("e2e", True, True), loss, tiny.FP32, 0)
        history = trainer.run(lambda row: None, lambda: None)
    assert history.loss_best < history.loss_initial
    moved = [0, 0]
    for name, module in modules.items():
        lut, B, g, A, indices = before[name]
        assert torch.equal(module.lut, lut) and torch.equal(module.scale_B, B)
        assert torch.equal(module.rank_magnitude, g)
        moved[0] += not torch.equal(module.scale_A, A)
        moved[1] += int((module.indices != indices).sum())
        assert levels(module.indices.float(), GROUP) <= 2**module.bits
    assert moved[0] == len(modules) and moved[1] > 0


def test_its_bits_are_those_of_indices_and_scales(teacher, layers, made, tmp_path):
    student = student_of(teacher, made)
    checkpoints.save(student, tmp_path / "u", checkpoints.describe(teacher, uniform.preset(layers), layers))
    work = type("Work", (), {"folder": teacher, "machine": tiny.FP32})
    entry = evaluation.trained(work, "u", [tmp_path / "u"])
    assert entry.method == "uniform grid, trained"
    assert entry.students[0](torch.float32)[1]["bits"] == 2 + 16 / GROUP
