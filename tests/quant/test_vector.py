"""Vectors of weights that share an index: assignment, k-means and fit, against brute force and scalar codebooks."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.packed.linear import PackedLinear, stored
from qat.quant import assign, kmeans, latent, packing, vector_kmeans
from qat.quant.curvature import Curvature, Factor
from qat.quant.fit import Problem, fit, improve
from qat.quant.formats import Codebook, Vector
from qat.quant.linear import QuantLinear

DIM = 4


def problem(outputs: int, inputs: int, entries: int, dim: int = DIM, seed: int = 0, layers: int = 2):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, 4 * inputs, inputs, generator=draw) @ torch.randn(layers, inputs, inputs, generator=draw)
    weight, S = (torch.randn(layers, outputs, inputs, generator=draw) for _ in range(2))
    return weight, 0.5 + S.abs(), torch.randn(layers, entries, dim, generator=draw), x.mT @ x / (4 * inputs)


def at(S, vectors, index):
    return torch.stack([v[i.long()].flatten(-2) for v, i in zip(vectors, index, strict=True)]) * S


def every_choice(S, vectors, blocks):
    """All weights [N, O, I, C] that a row of so few blocks can have."""
    found = [
        at(S, vectors, torch.tensor(choice).expand(*S.shape[:2], -1))
        for choice in itertools.product(range(vectors.shape[1]), repeat=blocks)
    ]
    return torch.stack(found, -1)


@pytest.mark.parametrize("seed", range(3))
def test_one_block_gets_the_cheapest_vector_of_all(seed):
    weight, S, vectors, H = problem(9, DIM, 32, seed=seed)
    away = every_choice(S, vectors, 1) - weight[..., None]
    damped = H + 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(DIM)
    cost = torch.einsum("noic,nij,nojc->noc", away.double(), damped.double(), away.double())
    compensated = assign.compensated(weight, S, vectors, Factor.of(H, DIM))
    start = torch.zeros(2, 9, 1, dtype=torch.uint8)
    descended = assign.descended(weight, S, vectors, Curvature(damped), start)
    for index in (compensated, descended):
        assert torch.equal(index[..., 0].long(), cost.argmin(-1))


def test_nearest_vectors_are_nearest_by_the_scaled_distance():
    weight, S, vectors, _ = problem(9, DIM, 32)
    away = (every_choice(S, vectors, 1) - weight[..., None]).norm(dim=2)
    assert torch.equal(assign.nearest(weight, S, vectors)[..., 0].long(), away.argmin(-1))


def test_errors_of_a_block_are_made_up_for_by_later_ones():
    """The second block is the best one for given first ones, and the first costs least if the second is free."""
    weight, S, vectors, H = problem(12, 2 * DIM, 16)
    factor = Factor.of(H, DIM)
    index = assign.compensated(weight, S, vectors, factor)
    damped = (H + 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(2 * DIM)).double()
    away = (every_choice(S, vectors, 2) - weight[..., None]).double().unflatten(-1, (16, 16))
    for n in range(2):
        first = factor.order_NI[n, :DIM]
        later = factor.order_NI[n, DIM:]
        lead = 0 if first[0] == 0 else 1
        assert torch.equal(first - first[0], torch.arange(DIM)) and first[0] % DIM == 0
        A, B, C = damped[n][first][:, first], damped[n][first][:, later], damped[n][later][:, later]
        free = A - B @ torch.linalg.inv(C) @ B.T
        one = away[n][:, first].select(3 - lead, 0)
        cost = torch.einsum("oik,ij,ojk->ok", one, free, one)
        assert torch.equal(index[n, :, lead].long(), cost.argmin(-1))
        whole = torch.einsum("oikl,ij,ojkl->okl", away[n], damped[n], away[n])
        for o in range(12):
            given = whole[o].select(lead, int(index[n, o, lead]))
            assert int(index[n, o, 1 - lead]) == int(given.argmin())


@pytest.mark.parametrize("coupled", [False, True])
def test_descent_never_raises_the_cost(coupled):
    weight, S, vectors, H = problem(40, 72, 64)
    G = problem(40, 40, 1, seed=1)[3] if coupled else None
    scale = None if G is None else G.diagonal(dim1=1, dim2=2).rsqrt()
    cost = Curvature(H, None if G is None else G * scale[:, :, None] * scale[:, None])
    index = assign.nearest(weight, S, vectors)
    found = [cost.cost(weight - at(S, vectors, index))]
    for _ in range(3):
        index = assign.descended(weight, S, vectors, cost, index)
        found.append(cost.cost(weight - at(S, vectors, index)))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(found))
    assert (found[-1] < 0.9 * found[0]).all()


def test_kmeans_finds_separate_clusters_whatever_else_is_in_the_stack():
    draw = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(2, 16, DIM, generator=draw)
    of = torch.randint(16, (2, 1500), generator=draw)
    x = centres.gather(1, of[..., None].expand(-1, -1, DIM)) + 0.01 * torch.randn(2, 1500, DIM, generator=draw)
    weight = 0.5 + torch.rand(2, 1500 * DIM, generator=draw)
    found = vector_kmeans.kmeans(x.flatten(1), weight, 16, DIM)
    away = torch.cdist(centres, found)
    assert (away.amin(1) < 0.02).all() and (away.amin(2) < 0.02).all()
    assert torch.equal(vector_kmeans.kmeans(x[1:].flatten(1), weight[1:], 16, DIM)[0], found[1])


def test_of_vectors_without_weight_nothing_is_learnt():
    x, weight = torch.tensor([[1.0, 2, 3, 4, 100, 100]]), torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    found = vector_kmeans.kmeans(x, weight, 2, 2)[0]
    assert torch.equal(found[found[:, 0].argsort()], torch.tensor([[1.0, 2], [3, 4]]))


@pytest.mark.parametrize("coupled", [False, True])
def test_vectors_cost_less_than_numbers_of_as_many_bits(coupled):
    weight, _, _, H = problem(256, 128, 1, layers=1)
    weight *= 0.5 + torch.rand(1, 256, 1, generator=torch.Generator().manual_seed(1))
    G = problem(256, 256, 1, seed=2, layers=1)[3] if coupled else None
    found = {}
    for format in (Codebook(2, 2), Vector(2, 2, 4)):
        posed = Problem(weight, H, Factor.of(H, format.dim), G)
        made = fit(posed, format, kmeans.kmeans, rounds=2, sweeps=1)
        found[format] = float(Curvature(H, G).cost(weight - format.grid(made.operands).at(made.index_NOI)))
        better = improve(posed, format, made, sweeps=1)
        assert better.index_NOI.dtype is torch.uint8 and better.index_NOI.shape == (1, 256, 128 // format.dim)
    assert found[Vector(2, 2, 4)] < 0.9 * found[Codebook(2, 2)]


def layer_of(format: Vector, outputs: int, inputs: int) -> QuantLinear:
    draw = torch.Generator().manual_seed(0)
    module = QuantLinear(format, outputs, inputs).requires_grad_(False)
    module.indices.random_(0, format.entries, generator=draw)
    module.set_parts({name: torch.randn(part.shape, generator=draw) for name, part in module.parts().items()})
    return module


@pytest.mark.parametrize("format", [Vector(2, 3, 4), Vector(5, 2, 2)], ids=str)
def test_a_packed_layer_is_the_same_matrix_whole_and_by_rows(format):
    module, made = layer_of(format, 10, 36), PackedLinear(format, 10, 36, bias=False)
    described = format.indices(10, 36)
    made.indices.copy_(packing.pack(module.indices, described.bits))
    for name, part in format.parts(10, 36).items():
        made.get_buffer(name).copy_(stored(part, module.parts()[name]))
    expected = format.weight(module.indices, {name: x.half().float() for name, x in module.parts().items()})
    some = torch.tensor([7, 0, 7, 3])
    assert torch.equal(made.weight(torch.float32), expected)
    torch.testing.assert_close(made.rows(some, torch.float32), expected[some])
    held = sum(buffer.numel() * buffer.itemsize for buffer in made.buffers())
    assert 8 * held == format.stored_bits(10, 36) + 16 * format.rank  # magnitudes


def test_latent_vectors_begin_on_the_way_to_the_weight_as_far_as_the_cell_reaches():
    module = layer_of(Vector(2, 2, 2), 6, 8)
    weight = 2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    entry, grid = module.weight(torch.float32), module.grid()
    found = latent.between(module, weight)
    shares = ((found - entry) / (weight - entry)).unflatten(1, (-1, 2))
    torch.testing.assert_close(shares[..., 0], shares[..., 1], rtol=1e-3, atol=1e-4)
    share = shares[..., 0].repeat_interleave(2, 1) / latent.REACH
    assert (share < 0.999).any() and (share <= 1 + 1e-4).all()
    for part, same in ((0.99, True), (1.01, False)):
        index = grid.nearest(entry + part * share * (weight - entry))
        stopped = share[:, ::2] < 0.98
        assert ((index == module.indices)[stopped] == same).all()


def test_rows_that_vectors_do_not_divide_are_told():
    misfit = Vector(2, 2, 4).misfit(20, 50)
    assert (misfit.setting, misfit.why) == ("dim", "has rows of 50 weights, which vectors of 4 do not divide")


KERNELS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from qat.quant.formats import Vector, vector_kernels
from qat.quant.lookup import index_type
draw = torch.Generator().manual_seed(0)
cases = (Vector(2, 5, 4), 2, 20, 52), (Vector(1, 1, 8), 1, 9, 40), (Vector(5, 2, 2), 1, 5, 22)
for format, N, O, I in cases:
    shapes = {name: (N, *part.shape) for name, part in format.parts(O, I).items()}
    operands = format.operands({name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()})
    latent, grad = torch.randn(2, N, O, I, generator=draw)
    index = torch.randint(format.entries, (N, *format.indices(O, I).shape), generator=draw)
    index = index.to(index_type(format.entries))
    room = -(-O * I // 16) * 16  # weights begin at multiples of 16
    flat, starts = torch.zeros(N * room), torch.arange(N) * room
    layers = flat.view(N, room)[:, : O * I].unflatten(1, (O, I))
    grid = format.grid({name: operand.double() for name, operand in operands.items()})
    for given in (None, latent):
        vector_kernels.write(index, operands, given, flat, starts)
        assert torch.allclose(layers.double(), grid.at(index), rtol=1e-5, atol=1e-4)
    away = lambda i: (latent.double() - grid.at(i)).unflatten(2, (-1, format.dim)).norm(dim=3)
    assert torch.allclose(away(index), away(grid.nearest(latent.double())), rtol=1e-5)
    layers.copy_(grad)
    found = {name: torch.empty_like(operand) for name, operand in operands.items()}
    vector_kernels.gradients(flat, starts, index, operands, found)
    exact = format.gradients(grad.double(), index, {name: operand.double() for name, operand in operands.items()})
    assert all(torch.allclose(x.double(), exact[name], rtol=1e-5, atol=1e-3) for name, x in found.items())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is tested itself")
def test_the_kernels_compute_the_plain_formula_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", KERNELS], cwd=Path(__file__).parents[2], env=os.environ, text=True)
    assert done.returncode == 0
