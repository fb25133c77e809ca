"""The optimizer: AdamW with learning rates relative to what they change, warm-up, then cosine."""

import math
from typing import Any

import torch
from torch import Tensor

from qat.config import TrainConfig
from qat.distill.moments import STATE, HostMoments
from qat.distill.parameters import LATENT, Parameter

BETAS, EPS = (0.9, 0.95), 1e-8


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) whose rate for each tensor is relative to its root mean square.

    Codebooks are of order one and unit-norm scales of order one over the root of the layer's width: one
    absolute rate would freeze the first or shake the second. Rates are rounded to two digits, so that
    tensors of about one size go through one fused kernel.

    Scaling, clipping and skipping happen on the device, inside that kernel: nothing waits for the host.

    Attributes:
        adam: of all tensors but those whose moments are in host memory; None where there is none.
        far: of these; None where there is none.
    """

    def __init__(
        self, parameters: list[Parameter], train: TrainConfig, device: torch.device, host: bool = False
    ) -> None:
        """Each parameter's rate is `train.lr` times the factor of its kind, its pace and its root mean square.

        With `host` the moments of latent weights are in host memory.
        """
        sizes = torch.stack([p.value.detach().square().mean().sqrt() for p in parameters]).tolist()
        rates = [
            float(f"{train.lr * getattr(train.learn, p.kind) * p.pace * max(size, 1e-8):.1e}")
            for p, size in zip(parameters, sizes, strict=True)
        ]
        known = list(dict.fromkeys(rates))
        self._base = torch.tensor(known, dtype=torch.float32, device=device)
        self._rates = self._base.clone()
        self._factor = torch.ones((), dtype=torch.float32, device=device)
        self._begun = False
        near: dict[float, list[Tensor]] = {}
        far: dict[str, tuple[Parameter, Tensor]] = {}
        of = dict(zip(known, self._rates, strict=True))
        for parameter, rate in zip(parameters, rates, strict=True):
            if host and parameter.kind == LATENT:
                far[parameter.name] = parameter, of[rate]
            else:
                near.setdefault(rate, []).append(parameter.value)
        groups = [{"params": tensors, "lr": of[rate]} for rate, tensors in near.items()]
        settings: Any = {"betas": BETAS, "eps": EPS, "weight_decay": train.weight_decay}
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(groups, fused=True, capturable=cuda, **settings) if groups else None
        self.far = HostMoments(list(far.values()), BETAS, EPS, train.weight_decay, device) if far else None

    def set_factor(self, factor: float) -> None:
        """The schedule's factor on every rate, for the next steps."""
        self._factor.fill_(factor)

    def step(self, divisor: Tensor, skip: Tensor) -> None:
        """One update with the gradients divided by `divisor`; none where `skip` is 1. Both are fp32 scalars."""
        self._begun = True
        torch.mul(self._base, self._factor, out=self._rates)
        if self.adam is not None:
            # Attributes that torch's own gradient scaler sets and that the fused kernels read.
            self.adam.grad_scale, self.adam.found_inf = divisor, skip  # type: ignore[attr-defined]
            self.adam.step()
        if self.far is not None:
            self.far.step(divisor, skip)

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        """The step count and the moments of a parameter; empty before the first step.

        Of one that another process updates they are without memory, as the parameter is.
        """
        if not self._begun:
            return {}
        if parameter.value.is_meta:
            whole = parameter.value.detach()
            return dict(zip(STATE, (whole.new_empty(()), whole, whole), strict=True))
        if self.far is not None and self.far.holds(parameter):
            return self.far.state(parameter)
        return {name: self._near.state[parameter.value][name] for name in STATE}

    def load(self, parameter: Parameter, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        if not tensors:
            return
        self._begun = True
        if self.far is not None and self.far.holds(parameter):
            self.far.load(parameter, tensors)
            return
        for name, value in tensors.items():
            self._near.state[parameter.value][name] = value.to(parameter.value.device, copy=True)

    @property
    def _near(self) -> torch.optim.AdamW:
        assert self.adam is not None
        return self.adam


def factor(step: int, train: TrainConfig) -> float:
    """The schedule's factor on the learning rate at `step`, counted from 0.

    It rises by equal steps over the first `train.warmup` of them, then falls to zero as a cosine.
    """
    rising = max(1, round(train.warmup * train.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, train.steps - rising)))
