import math

import pytest
import torch

from qat.config import LearnConfig, TrainConfig
from qat.distill import moments
from qat.distill.optim import Optimizer, factor
from qat.distill.parameters import Learners, Parameter
from qat.machine import Machine
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear
from tests.devices import DEVICES

CPU = torch.device("cpu")
ONE, NO = torch.ones(()), torch.zeros(())


def optimizer(values: list[torch.Tensor], train: TrainConfig, kind: str = "scales") -> Optimizer:
    return Optimizer([Parameter(str(i), kind, value) for i, value in enumerate(values)], train, CPU)


def rates(chosen: Optimizer, values: list[torch.Tensor]) -> list[float]:
    """The rate of each tensor."""
    groups = chosen.adam.param_groups
    return [float(g["lr"]) for value in values for g in groups if any(value is p for p in g["params"])]


def moved(chosen: Optimizer, value: torch.Tensor, grad: list[float], divisor=ONE, skip=NO) -> torch.Tensor:
    before, value.grad = value.clone(), torch.tensor(grad)
    chosen.step(divisor, skip)
    return value - before


def test_the_rate_rises_in_equal_steps_then_falls_as_a_cosine():
    train = TrainConfig(steps=20, warmup=0.2)
    rates = [factor(step, train) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([(1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)])
    assert factor(20, train) == pytest.approx(0)


@pytest.mark.parametrize("steps", [1, 2, 3, 60])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_every_step_learns_and_none_beyond_the_full_rate(steps, warmup):
    rates = [factor(step, TrainConfig(steps=steps, warmup=warmup)) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates) and max(rates) == 1


def test_each_tensor_learns_relative_to_its_root_mean_square():
    values = [torch.tensor([3.0, -4.0]), torch.full((2, 2), 0.01)]
    chosen = optimizer(values, TrainConfig(lr=1e-2, weight_decay=0.5))
    assert rates(chosen, values) == pytest.approx([1e-2 * math.sqrt(12.5), 1e-4], rel=0.05)
    assert [group["weight_decay"] for group in chosen.adam.param_groups] == [0.5, 0.5]


def test_each_kind_learns_at_its_own_multiple():
    train, value = TrainConfig(lr=1e-2, learn=LearnConfig(latent=0.3)), torch.ones(2)
    assert rates(optimizer([value], train, "latent"), [value]) == pytest.approx([3e-3])


def test_latent_weights_of_more_bits_learn_slower():
    """One rate of `train.learn.latent` for all: at 2, 3 and 4 bits those that were best for each."""
    layers = {str(bits): QuantLinear(Codebook(bits, 1), 4, 4) for bits in range(1, 9)}
    for layer in layers.values():
        layer.latent = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
        layer.curvature = torch.ones(4), torch.ones(4)
    learn = LearnConfig(scales=0, codebooks=0, latent=10.0)
    learners = Learners(torch.nn.Module(), layers, learn, Machine(CPU, torch.float32, 1), False)
    found = rates(Optimizer(learners.parameters, TrainConfig(learn=learn), CPU), [p.value for p in learners.parameters])
    assert found[1:4] == pytest.approx([1e-2, 4e-3, 1.75e-3], rel=0.05)
    assert sorted(found, reverse=True) == found and found[7] > 0


def test_tensors_of_about_one_size_share_a_group():
    values = [torch.full((2,), size) for size in (1.0, 1.01, 2.0)]
    assert len(optimizer(values, TrainConfig()).adam.param_groups) == 2


def test_the_first_step_moves_each_number_by_its_rate():
    value = torch.tensor([1.0, -2.0, 2.0])
    chosen = optimizer([value], TrainConfig(lr=1e-2))
    assert torch.allclose(moved(chosen, value, [5.0, 0.1, -3.0]), torch.tensor([-0.017, -0.017, 0.017]), rtol=1e-3)


def test_the_factor_scales_every_rate():
    values = [torch.ones(2), torch.full((2,), 3.0)]
    chosen = optimizer(values, TrainConfig(lr=1e-2))
    chosen.set_factor(0.5)
    for value in values:
        value.grad = torch.ones(2)
    chosen.step(ONE, NO)
    assert torch.allclose(values[0], torch.full((2,), 1 - 5e-3)) and torch.allclose(values[1], torch.full((2,), 2.985))
    assert rates(chosen, values) == pytest.approx([5e-3, 1.5e-2])


@pytest.mark.parametrize("device", DEVICES)
def test_moments_in_host_memory_change_no_bit(device, monkeypatch):
    """In pieces, over skipped and clipped steps, and with a state taken over."""
    monkeypatch.setattr(moments, "PIECE", 64)  # whole vectors of any CPU
    draw, device = torch.Generator().manual_seed(0), torch.device(device)
    starts = {"latent": (37, 19), "scales": (5, 3), "codebooks": (4,), "further": (100,)}
    numbers = {name: torch.randn(shape, generator=draw, dtype=torch.float32) for name, shape in starts.items()}
    train = TrainConfig(lr=1e-2, weight_decay=0.1, learn=LearnConfig(latent=1.0))

    def made(host):
        kinds = {"further": "latent"}
        parameters = [Parameter(n, kinds.get(n, n), value.clone().to(device)) for n, value in numbers.items()]
        return parameters, Optimizer(parameters, train, device, host)

    (near, plain), (far, chosen) = made(False), made(True)
    assert chosen.far is not None and plain.far is None
    for step in range(7):
        divisor, skip = torch.tensor(1.0 + step, device=device), torch.tensor(float(step == 2), device=device)
        for parameter in near:
            parameter.value.grad = torch.randn(parameter.value.shape, generator=draw).to(device)
        for one, other in zip(near, far, strict=True):
            other.value.grad = one.value.grad.clone()
        for each in (plain, chosen):
            each.set_factor(1 / (1 + step))
            each.step(divisor, skip)
        if step == 4:
            states = [chosen.state(parameter) for parameter in far]
            chosen = Optimizer(far, train, device, True)
            chosen._base.copy_(plain._base)  # rates are those of the beginning
            for parameter, state in zip(far, states, strict=True):
                chosen.load(parameter, state)
        for one, other in zip(near, far, strict=True):
            assert torch.equal(one.value, other.value)
            for name, value in plain.state(one).items():
                assert torch.equal(chosen.state(other)[name].cpu(), value.cpu()), (one.name, name, step)


def test_latent_weights_alone_have_moments_in_host_memory():
    parameter = Parameter("x", "latent", value := torch.ones(3))
    chosen = Optimizer([parameter], TrainConfig(lr=1e-2, learn=LearnConfig(latent=1.0)), CPU, True)
    assert chosen.state(parameter) == {}
    assert moved(chosen, value, [1.0, -1.0, 0.0]).tolist() == pytest.approx([-1e-2, 1e-2, 0.0])


def test_a_skipped_step_changes_nothing_and_the_next_is_the_first():
    value, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    chosen, plain = (optimizer([v], TrainConfig(lr=1e-2)) for v in (value, other))
    assert torch.equal(moved(chosen, value, [math.nan, math.inf], skip=ONE), torch.zeros(2))
    for grad in ([1.0, -2.0], [0.5, 0.5]):
        assert torch.equal(moved(chosen, value, grad), moved(plain, other, grad))


def test_gradients_are_divided_before_they_count():
    value, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    chosen, plain = (optimizer([v], TrainConfig(lr=1e-2)) for v in (value, other))
    for grad in ([1.0, -2.0], [0.5, 0.5]):
        scaled = [4096 * g for g in grad]
        assert torch.allclose(moved(chosen, value, scaled, torch.tensor(4096.0)), moved(plain, other, grad))


def test_a_tensor_of_zeros_has_a_rate_above_zero():
    value = torch.zeros(3)
    assert rates(optimizer([value], TrainConfig()), [value])[0] > 0


def test_the_state_taken_over_goes_on_to_the_same_bits():
    start, train = torch.tensor([1.0, 2.0]), TrainConfig(lr=1e-2)
    first, second = (Parameter("x", "scales", start.clone()) for _ in range(2))
    chosen, other = (Optimizer([p], train, CPU) for p in (first, second))
    moved(chosen, first.value, [1.0, -2.0])
    second.value.copy_(first.value)
    other.load(second, {name: tensor.clone() for name, tensor in chosen.state(first).items()})
    assert torch.equal(moved(other, second.value, [0.5, 3.0]), moved(chosen, first.value, [0.5, 3.0]))
