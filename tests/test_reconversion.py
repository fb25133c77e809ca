"""Converting from a checkpoint: what stays, what is fitted anew, and to which weights."""

import pytest
import torch

from qat import checkpoints
from qat.artifacts import open_artifact, read_manifest
from qat.config import (
    CheckpointConfig,
    Config,
    ConvertConfig,
    KMeansBackend,
    KMeansConfig,
    QuantConfig,
    TrackerConfig,
    TrackerKind,
    WeightConfig,
)
from qat.quant.formats import Codebook
from qat.quant.linear import kept, quantized
from qat.runs import Run
from qat.stages import convert
from qat.stages.workspace import Workspace
from tests import tiny

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def start(teacher, cache, tmp_path_factory):
    return tiny.checkpoint_in(tmp_path_factory.mktemp("start") / "checkpoint", teacher, cache)


@pytest.fixture
def reconvert(teacher, cache, start, tmp_path):
    """Converts the checkpoint (or a given one) to other codebooks; returns the student and its manifest."""

    def work(mlp, attn, folder=start):
        config = Config(outputs=str(tmp_path))
        config.quant = QuantConfig("other", WeightConfig(*mlp), WeightConfig(*attn))
        config.kmeans = KMeansConfig("exact", KMeansBackend.exact)
        config.convert = ConvertConfig(calibration_tokens=256, rounds=2, sweeps=1)
        config.checkpoint = CheckpointConfig("local", str(folder))
        config.mode.name = config.cache.name = "tiny"
        (tmp_path / "run").mkdir(exist_ok=True)
        config.tracker = TrackerConfig("none", TrackerKind.none)
        made = convert.make(Workspace(config, Run(config, tmp_path / "run"), tiny.FP32, teacher, teacher), cache)
        return checkpoints.load(made.folder, teacher, tiny.FP32)

    return work


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_growing_ranks_keep_the_function(teacher, start, reconvert):
    before, _ = checkpoints.load(start, teacher, tiny.FP32)
    after, manifest = reconvert(mlp=(2, 9), attn=(4, 5))
    assert torch.allclose(logits(after), logits(before), rtol=1e-5, atol=1e-5)
    assert {layer.format.rank for layer in checkpoints.layers_of(manifest)} == {9, 5} and not manifest["figures"]


def test_new_ranks_can_learn(start, teacher):
    before, _ = checkpoints.load(start, teacher, tiny.FP32)
    layer = quantized(before)["model.layers.0.self_attn.q_proj"]
    grown = kept(layer, Codebook(layer.format.bits, 6))
    A, g, B = grown.scale_A, grown.rank_magnitude.clone().requires_grad_(), grown.scale_B
    (grown.codebook[grown.indices.long()] * ((A * g) @ B)).square().sum().backward()
    assert (g.grad[2:].abs() > 1e-6).all()


def test_other_bits_are_fitted_anew_and_the_rest_is_kept(teacher, start, reconvert):
    before, _ = checkpoints.load(start, teacher, tiny.FP32)
    after, manifest = reconvert(mlp=(4, 4), attn=(4, 4))
    old, new = quantized(before), quantized(after)
    for name in new:
        same = torch.equal(new[name].indices, old[name].indices)
        assert same == (".self_attn." in name) and (name in manifest["figures"]) == (".mlp." in name)
        close(new[name].weight(torch.float32), old[name].weight(torch.float32), 1e-6 if same else 0.15)
    assert manifest["metrics"]["before"]["kl"] == pytest.approx(manifest["metrics"]["after"]["kl"], rel=0.2)


def test_latent_weights_are_what_is_fitted_where_there_are_some(teacher, start, reconvert, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    latent = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    student, manifest = checkpoints.load(start, teacher, tiny.FP32)
    folder = tmp_path / "with_latent"
    quantized(student)[name].latent = torch.nn.Parameter(latent)
    checkpoints.save(student, folder, checkpoints.heritage(manifest))
    after, _ = reconvert(mlp=(4, 4), attn=(4, 2), folder=folder)
    close(quantized(after)[name].weight(torch.float32), latent, 0.2)


def close(found, expected, relative):
    assert float((found - expected).norm() / expected.norm()) <= relative


def test_fewer_ranks_are_fitted_anew(start, reconvert):
    _, manifest = reconvert(mlp=(2, 4), attn=(4, 1))
    assert {name for name in manifest["figures"]} == {name for name in manifest["layers"] if ".self_attn." in name}
    assert read_manifest(start)["quant"]["attn"]["rank"] == 2 and open_artifact(start)
