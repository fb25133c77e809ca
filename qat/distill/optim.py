"""The optimizer: AdamW with learning rates relative to what they change, warm-up, then cosine."""

import math

import torch
from torch import nn

from qat.config import TrainConfig


def optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) whose rate for each tensor is `train.lr` times its root mean square.

    Tables are of order one and unit-norm scales of order one over the root of the layer's width: one
    absolute rate would freeze the first or shake the second.
    """
    groups = [{"params": [p], "lr": train.lr * _root_mean_square(p)} for p in parameters]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=train.weight_decay)


def schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear rise over the first `train.warmup` of the steps, cosine to zero over the rest."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, train))


def rate(step: int, train: TrainConfig) -> float:
    """The factor on the learning rate at `step`, counted from 0."""
    rising = max(1, round(train.warmup * train.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, train.steps - rising)))


def _root_mean_square(parameter: nn.Parameter) -> float:
    return float(parameter.detach().square().mean().sqrt().clamp_min(1e-8))
