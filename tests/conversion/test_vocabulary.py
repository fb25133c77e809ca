"""What errors in embedding and head cost, and their fit: against float64, another way there, and all there are."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from qat.cache.batch import Text
from qat.config import ConvertConfig, WeightConfig
from qat.conversion import moments, vocabulary
from qat.quant import formats, kmeans
from qat.quant.architectures import Layer, select
from tests import tiny

EMBED = WeightConfig(bits=3, rank=2)
SETTINGS = ConvertConfig(rounds=6, sweeps=4)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(512, (6, 24), generator=torch.Generator().manual_seed(0))


def gathered(teacher, rows, gradients=False):
    model = teacher.load(torch.float32, tiny.CPU)
    layers = select(model, replace(tiny.QUANT, embed=EMBED))
    return moments.gather(model, layers, Text(rows).batches(2), gradients)


@torch.no_grad()
def test_a_tied_matrix_costs_what_both_of_its_jobs_cost(teacher, rows):
    found = gathered(teacher, rows)
    model = teacher.load(torch.float64, tiny.CPU)
    hidden = model.base_model(rows).last_hidden_state.flatten(0, 1)
    p = (hidden @ model.lm_head.weight.T).softmax(-1)
    H, bends = hidden.T @ hidden / len(hidden), (p * (1 - p)).mean(0)
    shares = torch.bincount(rows.flatten(), minlength=512) / rows.numel()
    spread = bends.sum() * H.trace()  # as much for the embedding as for the head
    row = bends * H.trace() + shares * spread
    matrix = (bends.sum() * H + spread / 64 * torch.eye(64)) / (2 * spread)
    name = "model.embed_tokens"
    assert torch.allclose(found.rows[name].double(), row, rtol=1e-3)
    assert torch.allclose(found.inputs[name].double(), matrix, rtol=1e-3, atol=1e-3 * matrix.abs().max())


def test_gradients_at_rows_are_the_same_layer_after_layer_and_whole(teacher, rows, monkeypatch):
    found = gathered(teacher, rows, gradients=True)
    monkeypatch.setattr(moments, "flows", lambda *_: False)
    whole = gathered(teacher, rows, gradients=True)
    name = "model.embed_tokens"
    assert torch.allclose(found.rows[name], whole.rows[name], rtol=1e-3)
    assert (found.inputs[name] - whole.inputs[name]).norm() < 1e-3 * whole.inputs[name].norm()


def problem(tokens, hidden, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight, half = (torch.randn(*shape, generator=draw) for shape in ((tokens, hidden), (hidden, 3 * hidden)))
    return weight, (half @ half.T / 3 / hidden, torch.rand(tokens, generator=draw) ** 3)


def quantize(format, weight, curvature, most=1e9):
    layer = Layer("embed", "embed", tuple(weight.shape), format)
    made, told = vocabulary.quantize(layer, weight, curvature, None, kmeans.kmeans, SETTINGS, most)
    return format.grid(made.operands).at(made.index_NOI)[0], told


@pytest.mark.parametrize("seed", range(4))
def test_a_small_grid_is_about_as_good_as_the_best_of_all(seed):
    """Every row has a scale and a choice of 2^6 indices; all of them, each with its best scale."""
    weight, (matrix, row) = problem(5, 6, seed)
    made, _ = quantize(formats.of({"format": "grid", "bits": 1, "group": 6, "levels": "halves"}), weight, (matrix, row))
    signs = torch.tensor(list(product([-0.5, 0.5], repeat=6)))
    scale = (signs @ matrix @ weight.T) / ((signs @ matrix) * signs).sum(1, keepdim=True)
    away = signs[:, None] * scale[..., None] - weight
    best = (away @ matrix * away).sum(-1).amin(0)
    found = ((made - weight) @ matrix * (made - weight)).sum(-1)
    assert (found > best * 0.999).all() and (found * row).sum() < 1.15 * (best * row).sum()


GRID = {"format": "grid", "bits": 3, "group": 16, "levels": "shifted"}


@pytest.mark.parametrize("settings", [{"bits": 3, "rank": 4}, GRID])
def test_in_pieces_it_is_about_as_good_as_whole(settings):
    weight, curvature = problem(600, 32)
    weight *= torch.rand(600, 1) + 0.3
    format = formats.of({"format": "codebook"} | settings)
    _, whole = quantize(format, weight, curvature)
    _, pieces = quantize(format, weight, curvature, most=vocabulary.COPIES * 4 * 32 * 100)  # a hundred rows at once
    assert pieces["output_error"] < 1.1 * whole["output_error"]
    assert pieces["weight_error"] < 1.25 * whole["weight_error"]
