"""The optimizer: AdamW with learning rates relative to what they change, warm-up, then cosine."""

import math

import torch
from torch import Tensor

from qat.config import TrainConfig
from qat.distill.parameters import Parameter

STATE = ("step", "exp_avg", "exp_avg_sq")  # what torch's AdamW keeps of a tensor


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) whose rate for each tensor is relative to its root mean square.

    Codebooks are of order one and unit-norm scales of order one over the root of the layer's width: one
    absolute rate would freeze the first or shake the second. Rates are rounded to two digits, so that
    tensors of about one size go through one fused kernel.

    Scaling, clipping and skipping happen on the device, inside that kernel: nothing waits for the host.
    """

    def __init__(self, parameters: list[Parameter], train: TrainConfig, device: torch.device) -> None:
        """Each parameter's rate is `train.lr` times the factor of its kind, its pace and its root mean square."""
        sizes = torch.stack([p.value.detach().square().mean().sqrt() for p in parameters]).tolist()
        groups: dict[float, list[Tensor]] = {}
        for parameter, size in zip(parameters, sizes, strict=True):
            rate = train.lr * getattr(train.learn, parameter.kind) * parameter.pace * max(size, 1e-8)
            groups.setdefault(float(f"{rate:.1e}"), []).append(parameter.value)
        self._base = torch.tensor(list(groups), dtype=torch.float32, device=device)
        self._rates = self._base.clone()
        self._factor = torch.ones((), dtype=torch.float32, device=device)
        self.adam = torch.optim.AdamW(
            [{"params": tensors, "lr": rate} for tensors, rate in zip(groups.values(), self._rates, strict=True)],
            betas=(0.9, 0.95),
            weight_decay=train.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )

    def set_factor(self, factor: float) -> None:
        """The schedule's factor on every rate, for the next steps."""
        self._factor.fill_(factor)

    def step(self, divisor: Tensor, skip: Tensor) -> None:
        """One update with the gradients divided by `divisor`; none where `skip` is 1. Both are fp32 scalars."""
        torch.mul(self._base, self._factor, out=self._rates)
        # Attributes that torch's own gradient scaler sets and that the fused kernels read.
        self.adam.grad_scale, self.adam.found_inf = divisor, skip  # type: ignore[attr-defined]
        self.adam.step()

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        """The step count and the moments of a parameter; empty before the first step.

        Of one that another process updates they are without memory, as the parameter is.
        """
        if not self.adam.state:
            return {}
        if parameter.value.is_meta:
            whole = parameter.value.detach()
            return dict(zip(STATE, (whole.new_empty(()), whole, whole), strict=True))
        return {name: self.adam.state[parameter.value][name] for name in STATE}

    def load(self, parameter: Parameter, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        for name, value in tensors.items():
            self.adam.state[parameter.value][name] = value.to(parameter.value.device, copy=True)


def factor(step: int, train: TrainConfig) -> float:
    """The schedule's factor on the learning rate at `step`, counted from 0.

    It rises by equal steps over the first `train.warmup` of them, then falls to zero as a cosine.
    """
    rising = max(1, round(train.warmup * train.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, train.steps - rising)))
