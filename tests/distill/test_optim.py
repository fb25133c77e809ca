import math

import pytest
import torch
from torch import nn

from qat.config import TrainConfig
from qat.distill.optim import optimizer, rate, schedule


def test_the_rate_rises_in_equal_steps_then_falls_as_a_cosine():
    train = TrainConfig(steps=20, warmup=0.2)
    rates = [rate(step, train) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([(1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)])
    assert rate(20, train) == pytest.approx(0)


@pytest.mark.parametrize("steps", [1, 2, 3, 60])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_every_step_learns_and_none_beyond_the_full_rate(steps, warmup):
    rates = [rate(step, TrainConfig(steps=steps, warmup=warmup)) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates) and max(rates) == 1


def test_each_tensor_learns_relative_to_its_root_mean_square():
    parameters = [nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.full((2, 2), 0.01))]
    groups = optimizer(parameters, TrainConfig(lr=1e-2, weight_decay=0.5)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2 * math.sqrt(12.5), 1e-4])
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]


def test_the_first_step_moves_each_number_by_its_rate():
    train = TrainConfig(lr=1e-2, steps=10, warmup=0.0)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 2.0]))
    before, size = parameter.detach().clone(), math.sqrt(3)
    chosen = optimizer([parameter], train)
    schedule(chosen, train)
    (parameter * torch.tensor([5.0, -0.1, 2.0])).sum().backward()
    chosen.step()
    expected = before - 1e-2 * size * torch.tensor([1.0, -1.0, 1.0])
    assert torch.allclose(parameter, expected, rtol=1e-4)


def test_the_schedule_scales_the_rate_of_every_tensor():
    train = TrainConfig(lr=1e-2, steps=10, warmup=0.3)
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 3.0))]
    chosen = optimizer(parameters, train)
    rates = schedule(chosen, train)
    for step in range(10):
        learning = [group["lr"] for group in chosen.param_groups]
        assert learning == pytest.approx([1e-2 * rate(step, train), 3e-2 * rate(step, train)])
        chosen.step()
        rates.step()


def test_a_tensor_of_zeros_has_a_rate_above_zero():
    assert optimizer([nn.Parameter(torch.zeros(3))], TrainConfig()).param_groups[0]["lr"] > 0
