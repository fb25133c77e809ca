import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear
from qat.quant.stack import Stack, stacks
from qat.quant.weights import Weights

PARTS = ("codebook", "scale_A", "rank_magnitude", "scale_B")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
SHAPES = [(70, 100, 2, 5), (64, 64, 4, 20), (33, 130, 1, 1), (256, 192, 4, 8)]


def layers(count, outputs, inputs, bits, rank, device="cpu", latent=False) -> list[QuantLinear]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        module = QuantLinear(Codebook(bits, rank), outputs, inputs)
        module.indices.copy_(torch.randint(2**bits, (outputs, inputs), generator=draw))
        for name in PARTS:
            parameter = getattr(module, name)
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
        if latent:
            module.latent = nn.Parameter(torch.randn(outputs, inputs, generator=draw))
            module.curvature = tuple(torch.rand(size, generator=draw).to(device) for size in (outputs, inputs))
        made.append(module.to(device))
    return made


def exact(module: QuantLinear, snap=False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """float64 leaves of a layer, and its weight by the plain formula."""
    p = {name: getattr(module, name).detach().double().cpu().requires_grad_() for name in PARTS}
    if not snap:
        return p, p["codebook"][module.indices.cpu().long()] * ((p["scale_A"] * p["rank_magnitude"]) @ p["scale_B"])
    norm = p["scale_B"].norm(dim=1).detach()
    A, B = p["scale_A"] * p["rank_magnitude"] * norm, p["scale_B"] / norm[:, None]
    A, B, codebook = (x + (x.detach().float().half().double() - x.detach()) for x in (A, B, p["codebook"]))
    return p, codebook[module.indices.cpu().long()] * (A @ B)


def stack_of(members: list[QuantLinear], dtype=torch.float32, latent=False, snap=False) -> Stack:
    return stacks(Weights(members, dtype, latent), snap)[0]


def train(stack: Stack, grads: torch.Tensor) -> None:
    """A step's passes, the weights' gradients coming in micro-batches."""
    stack.weights.begin(len(grads))
    stack.weights.clear()
    stack.write()
    for grad in grads:
        for layer, part in zip(stack.layers, grad, strict=True):
            (layer.dense.float() * part).sum().backward()
    stack.reduce()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("snap", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_are_those_of_the_plain_formula(shape, parts, snap, device):
    stack = stack_of(layers(2, *shape, device), snap=snap)
    grads = torch.randn(parts, 2, *shape[:2], generator=torch.Generator().manual_seed(1)).to(device)
    train(stack, grads)
    for n, layer in enumerate(stack.layers):
        p, weight = exact(layer, snap)
        size = float(weight.detach().abs().max())
        assert torch.allclose(layer.dense.double().cpu(), weight, atol=1e-5 * size)
        (weight * grads[:, n].sum(0).double().cpu()).sum().backward()
        for name in PARTS:
            expected, found = p[name].grad, getattr(layer, name).grad.double().cpu()
            # fp16 rounding of A and B enters their gradients too
            assert torch.allclose(found, expected, rtol=1e-3, atol=(2e-3 if snap else 1e-4) * expected.abs().max()), (
                name
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_short_type_the_weight_is_rounded_once_and_gradients_stay_fp32(dtype, device):
    stack = stack_of(layers(2, 70, 100, 2, 5, device), dtype)
    train(stack, torch.ones(2, 2, 70, 100, device=device))
    for layer in stack.layers:
        weight = exact(layer)[1]
        away = (layer.dense.double().cpu() - weight).abs()
        assert (away <= 1.01 * torch.finfo(dtype).eps / 2 * weight.abs() + 1e-6).all()
        assert {getattr(layer, name).grad.dtype for name in PARTS} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_indices_follow_latent_weights_whose_gradient_goes_straight_through(device):
    stack = stack_of(layers(2, 70, 100, 2, 5, device, latent=True), torch.bfloat16, latent=True)
    grads = torch.randn(2, 2, 70, 100, generator=torch.Generator().manual_seed(1)).bfloat16().float().to(device)
    train(stack, grads)
    for n, layer in enumerate(stack.layers):
        scale = ((layer.scale_A * layer.rank_magnitude).double() @ layer.scale_B.double())[..., None]
        away = (layer.latent.double()[..., None] - layer.codebook.double() * scale).abs()
        chosen = away.gather(-1, layer.indices.long()[..., None])[..., 0]
        assert torch.allclose(chosen, away.min(-1).values, atol=1e-5)
        assert torch.allclose(layer.latent.grad, grads[:, n].sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_moves_from_the_entry_to_the_latent_weight(device, dtype):
    stack = stack_of(layers(2, 70, 100, 2, 5, device, latent=True), dtype, latent=True)
    train(stack, torch.randn(1, 2, 70, 100, generator=torch.Generator().manual_seed(1)).to(device))
    before = [layer.latent.grad.double().clone() for layer in stack.layers]
    stack.shift(torch.tensor(3.0, device=device))
    for layer, grad in zip(stack.layers, before, strict=True):
        outputs, inputs = (part.double() for part in layer.curvature)
        term = 3 * outputs[:, None] * inputs * (layer.latent.double() - layer.dense.double())
        assert torch.allclose(layer.latent.grad.double(), grad + term, rtol=1e-5, atol=1e-5)
        assert term.abs().max() > 1


def test_latent_weights_come_to_rest_where_the_loss_is_lowest():
    """Under a loss `h/2 (w - wanted)²` of each weight, whose gradient is known at the entries alone."""
    (layer,) = layers(1, 24, 32, 2, 1, latent=True)
    layer.codebook.data.copy_(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    layer.scale_A.data.fill_(1)
    layer.scale_B.data.fill_(1)
    layer.rank_magnitude.data.fill_(1)
    wanted = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    layer.curvature = tuple(0.5 + part for part in layer.curvature)
    h = layer.curvature[0][:, None] * layer.curvature[1]
    stack = stack_of([layer], latent=True)
    stack.weights.begin(1)
    adam = torch.optim.Adam([layer.latent], lr=0.02)
    for step in range(600):
        adam.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        stack.write()
        layer.latent.grad.copy_(h * (layer.dense.detach() - wanted))
        stack.shift(torch.ones(()))
        adam.step()
    stack.write()
    nearest = (layer.codebook - wanted[..., None]).abs().min(-1).values
    found = (layer.dense.detach() - wanted).square().mean()
    assert found < 1.02 * nearest.square().mean()  # at the gradients of the entries it is 1.4 times that


def test_latent_weights_need_the_curvature():
    (layer,) = layers(1, 8, 6, 2, 3, latent=True)
    layer.curvature = None
    with pytest.raises(RuntimeError, match="curvature"):
        stack_of([layer], latent=True)


def test_layers_of_one_shape_share_a_stack_and_keep_their_own_values():
    first, second, other = *layers(2, 8, 6, 2, 3), *layers(1, 6, 8, 2, 3)
    second.codebook.data.add_(1)
    before = [layer.weight(torch.float32) for layer in (first, second, other)]
    made = stacks(Weights([first, other, second], torch.float32))
    assert [stack.layers for stack in made] == [[first, second], [other]]
    assert all(layer.weight(torch.float32).equal(w) for layer, w in zip((first, second, other), before, strict=True))
    made[0].parts["codebook"][1].zero_()
    assert second.codebook.abs().sum() == 0 and first.codebook.abs().sum() > 0


KERNELS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from qat.quant import kernels
from qat.quant.formats import Codebook, codebook_kernels
draw = torch.Generator().manual_seed(0)
for N, O, I, K, R in [(2, 70, 100, 4, 5), (1, 64, 64, 16, 20), (2, 33, 130, 2, 1)]:
    shapes = (N, K), (N, O, R), (N, R, I), (N, O, I), (N, O, I)
    codebook, A, B, latent, grad = (torch.randn(*shape, generator=draw) for shape in shapes)
    index = torch.randint(K, (N, O, I), generator=draw, dtype=torch.uint8)
    room = -(-O * I // 16) * 16  # weights begin at multiples of 16
    flat, starts = torch.zeros(N * room), torch.arange(N) * room
    layers = flat.view(N, room)[:, : O * I].unflatten(1, (O, I))
    operands = {"codebook": codebook, "A": A, "B": B}
    for given in (None, latent):
        codebook_kernels.write(index, operands, given, flat, starts)
        scale = A.double() @ B.double()
        exact = torch.stack([codebook[n].double()[index[n].long()] for n in range(N)]) * scale
        assert torch.allclose(layers.double(), exact, atol=1e-4)
    away = (latent.double()[..., None] - codebook.double()[:, None, None] * scale[..., None]).abs()
    assert torch.allclose(away.gather(-1, index.long()[..., None])[..., 0], away.min(-1).values, atol=1e-5)
    outputs, inputs, factor = torch.rand(N, O), torch.rand(N, I), torch.tensor(3.0)
    sums = torch.randn(N * room, generator=draw)
    expected = sums.clone().view(N, room)[:, : O * I].unflatten(1, (O, I))
    expected = expected + 3 * outputs[:, :, None] * inputs[:, None] * (latent - layers)
    kernels.shift(sums, flat, starts, latent, outputs, inputs, factor)
    assert torch.allclose(sums.view(N, room)[:, : O * I].unflatten(1, (O, I)), expected, atol=1e-5)
    found = {name: torch.empty_like(operand) for name, operand in operands.items()}
    layers.copy_(grad)
    codebook_kernels.gradients(flat, starts, index, operands, found)
    for n in range(N):
        one = {name: operand[n].double() for name, operand in operands.items()}
        exact = Codebook(K.bit_length() - 1, R).gradients(grad[n].double(), index[n], one)
        assert all(torch.allclose(x[n].double(), exact[name], atol=1e-3) for name, x in found.items())
# and a stack gives them what they take
from tests.quant import test_stack as plain
Codebook.kernels = lambda self, device: codebook_kernels
stack = plain.stack_of(plain.layers(2, 70, 100, 2, 5))
grads = torch.randn(1, 2, 70, 100, generator=draw)
plain.train(stack, grads)
for n, layer in enumerate(stack.layers):
    parts, weight = plain.exact(layer)
    assert torch.allclose(layer.dense.double(), weight, atol=1e-4)
    (weight * grads[0, n].double()).sum().backward()
    assert all(torch.allclose(layer.get_parameter(name).grad.double(), x.grad, atol=2e-2) for name, x in parts.items())
"""


GRID_KERNELS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from qat.quant.formats import GroupGrid, grid_kernels
from qat.quant.formats.grid import LEVELS
draw = torch.Generator().manual_seed(0)
formats = GroupGrid(2, 48), GroupGrid(4, 32, "shifted"), GroupGrid(4, 32, "iq4nl"), GroupGrid(8, 96, "integers")
for format, N, O, I in zip(formats, (2, 1, 2, 1), (100, 33, 9, 40), (96, 96, 96, 192)):
    kernels = grid_kernels.GridKernels(tuple(map(float, LEVELS[format.levels](format.bits))), format.group)
    shapes = {name: (N, *part.shape) for name, part in format.parts(O, I).items()}
    operands = format.operands({name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()})
    spread = max(map(abs, kernels.values))
    latent, grad = (torch.randn(N, O, I, generator=draw) * scale for scale in (spread, 1))
    index = torch.randint(2**format.bits, (N, O, I), generator=draw, dtype=torch.uint8)
    room = -(-O * I // 16) * 16
    flat, starts = torch.zeros(N * room), torch.arange(N) * room
    layers = flat.view(N, room)[:, : O * I].unflatten(1, (O, I))
    grid = format.grid({name: operand.double() for name, operand in operands.items()})
    for given in (None, latent):
        kernels.write(index, operands, given, flat, starts)
        assert torch.allclose(layers.double(), grid.at(index), rtol=1e-6, atol=1e-4)
    every = torch.stack([grid.absolute(v.expand(N, O, I)) for v in grid.values_NK[0]])
    closest = (latent.double() - every).abs().min(0).values
    assert torch.allclose((latent.double() - grid.at(index)).abs(), closest, rtol=1e-5, atol=1e-4)
    layers.copy_(grad)
    found = {name: torch.empty_like(operand) for name, operand in operands.items()}
    kernels.gradients(flat, starts, index, operands, found)
    exact = format.gradients(grad.double(), index, {name: operand.double() for name, operand in operands.items()})
    assert all(torch.allclose(x.double(), exact[name], rtol=1e-5, atol=1e-3) for name, x in found.items())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is tested itself")
@pytest.mark.parametrize("script", [KERNELS, GRID_KERNELS], ids=["codebook", "grid"])
def test_the_kernels_compute_the_plain_formula_in_tritons_interpreter(script):
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=os.environ, text=True)
    assert done.returncode == 0
