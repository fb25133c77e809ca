"""A student on grids, from conversion to exports: values stay even, all else learns, files say what they hold."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open

from qat import checkpoints
from qat.cache.batch import Text
from qat.cache.reader import CacheReader
from qat.config import (
    ExportConfig,
    ExportType,
    LearnConfig,
    Levels,
    LossKind,
    ModeConfig,
    QuantConfig,
    TrainConfig,
    WeightFormat,
)
from qat.config import WeightConfig as Weight
from qat.conversion.convert import install
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.errors import ConfigError
from qat.evaluate import evaluate
from qat.export.anemll_v2 import writer as anemll_v2
from qat.export.hf import writer as hf
from qat.export.packed import writer as packed
from qat.export.source import Source
from qat.quant.architectures import select
from qat.quant.linear import quantized
from tests import tiny

GROUP = 32
GRID = WeightFormat.grid
QUANT = QuantConfig(
    "g2a4", Weight(2, format=GRID, group=GROUP), Weight(4, format=GRID, group=GROUP, levels=Levels.shifted)
)


@pytest.fixture(scope="module")
def made(teacher, cache):
    rows = CacheReader(cache, "train").input_ids(16)
    return tiny.converted(teacher.load(torch.float32, tiny.CPU), rows, quant=QUANT)


@pytest.fixture
def student(teacher, made):
    model = teacher.load(torch.float32, tiny.CPU)
    install(model, {name: deepcopy(module) for name, (_, module, _) in made.items()})
    return model


@pytest.fixture
def checkpoint(teacher, made, student, tmp_path):
    layers = [layer for layer, _, _ in made.values()]
    checkpoints.save(student, tmp_path / "grid", checkpoints.describe(teacher, QUANT, layers))
    return tmp_path / "grid"


def even(weight, bits, shifts):
    """How far weights of groups are from evenly spaced values with so many steps, as a share of their range."""
    groups = weight.double().view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if not shifts:
        high = torch.maximum(high, -low)
        low = -high
    away = [  # a group may not use both ends of its values
        (groups - low - (groups - low).div((high - low) / steps).round() * (high - low) / steps).abs().amax(1)
        for steps in range(1, 2**bits)
    ]
    return (torch.stack(away).amin(0) / (high - low)[:, 0]).max()


def test_every_group_has_evenly_spaced_values(made):
    for layer, module, _ in made.values():
        assert even(module.weight(torch.float32), layer.format.bits, layer.format.shifts) < 1e-5
        values = module.weight(torch.float32).view(-1, GROUP)
        assert max(len(group.unique()) for group in values) <= 2**layer.format.bits


def test_the_fit_beats_nearest_values_on_the_first_scales(teacher, cache, made, student):
    held_out, exact = Text(CacheReader(cache, "eval").input_ids(8)), teacher.load(torch.float32, tiny.CPU)
    plain = teacher.load(torch.float32, tiny.CPU)
    with torch.no_grad():
        for layer in select(plain, QUANT):
            weight = plain.get_submodule(layer.name).weight
            first = layer.format.start(weight[None], torch.ones(1, layer.shape[1]), None)
            weight.copy_(layer.format.grid(first.operands).at(first.index_NOI)[0])
    fitted, nearest = (evaluate(model, exact, held_out, 8, tiny.FP32).kl for model in (student, plain))
    assert fitted < 0.8 * nearest


def test_training_moves_scales_shifts_and_indices_and_values_stay_even(teacher, cache, made, student):
    modules = quantized(student)
    checkpoints.native.add_latents(student, {}, teacher)
    before = {name: {"indices": m.indices.clone()} | m.normalized() for name, m in modules.items()}
    train = TrainConfig(steps=20, batch_size=8, lr=2e-3, learn=LearnConfig(scales=1.0, codebooks=1.0, latent=0.2))
    readers = CacheReader(cache, "train"), CacheReader(cache, "eval")
    kinds = {name: (layer.role, modules[name]) for name, (layer, _, _) in made.items()}
    loss = Loss(LossKind.bucket_kl, 1.0, 0.0, None)
    trainer = Trainer(student, kinds, readers, train, ModeConfig("e2e", True, True), loss, tiny.FP32, 0)
    history = trainer.run(lambda row: None, lambda: None)
    assert history.loss_best < history.loss_initial
    for name, module in modules.items():
        for part in module.parts():
            assert not torch.equal(module.get_parameter(part), before[name][part]), (name, part)
        assert even(module.weight(torch.float32), module.format.bits, module.format.shifts) < 1e-5
    assert any(not torch.equal(module.indices, before[name]["indices"]) for name, module in modules.items())


def test_a_checkpoint_says_the_format_and_gives_the_student_back(teacher, made, student, checkpoint):
    model, manifest = checkpoints.load(checkpoint, teacher, tiny.FP32)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, student(ids).logits)
    name = "model.layers.0.mlp.up_proj"
    settings = {"format": "grid", "bits": 2, "group": GROUP, "levels": "halves"}
    assert manifest["quant"]["mlp"] == settings
    assert manifest["layers"][name] == {"kind": "mlp", "shape": [128, 64]} | settings
    assert checkpoints.layers_of(manifest) == [layer for layer, _, _ in made.values()]
    assert checkpoints.has_formats(manifest, QUANT, teacher)
    with safe_open(checkpoint / "tables.safetensors", "pt") as file:
        assert {key for key in file.keys() if key.startswith(name)} == {f"{name}.indices", f"{name}.scale"}  # noqa: SIM118
        assert file.get_slice(f"{name}.scale").get_shape() == [128, 64 // GROUP]


def test_packed_and_dense_exports_compute_the_students_weights(teacher, student, checkpoint, tmp_path):
    model, manifest = checkpoints.load(checkpoint, teacher, tiny.FP32)
    source, ids = Source(teacher, model, manifest), torch.arange(12).view(2, 6)
    for number, exporter in enumerate((packed, hf)):
        folder = tmp_path / str(number)
        folder.mkdir()
        exporter.write(source, folder, ExportConfig("export", "hf", ExportType.fp32, dense=True))
        written, expected = exporter.read(source, folder)(ids).logits, student(ids).logits
        assert (written - expected).norm() < (1e-2 if exporter is packed else 1e-6) * expected.norm()
    config = json.loads((tmp_path / "0" / "config.json").read_text())["quantization_config"]
    with safe_open(tmp_path / "0" / "packed.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys() if "_proj." in key)  # noqa: SIM118
    weights = sum(module.indices.numel() for module in quantized(model).values())
    assert 8 * stored / weights == pytest.approx(config["bits_per_weight"], abs=1e-4)


def test_a_tool_that_knows_codebooks_alone_refuses_grids_by_name(teacher, checkpoint, tmp_path):
    source = Source(teacher, *checkpoints.load(checkpoint, teacher, tiny.FP32))
    with pytest.raises(ConfigError, match=r"export=anemll_v2 knows codebooks alone, and model\.layers\.0\..* grid"):
        anemll_v2.write(source, tmp_path, ExportConfig("export", "anemll_v2", ExportType.fp32))
    assert not list(tmp_path.glob("*.pt"))
