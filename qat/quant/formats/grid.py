"""Evenly spaced values, a scale for each group of a row's columns and perhaps a shift: what most engines run.

`W = (q − middle) · s + z` with `q` from 0 to 2^bits − 1. Without shifts values lie around zero, half of them on
either side (−1.5, −0.5, 0.5, 1.5), and all of them are used; with shifts `W = q · s + z`, which is the affine form
of MLX and of llama.cpp's Q4_1.

Shapes: N layers, O outputs, I inputs, K = 2^bits values, G groups of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.quant.formats.base import Format, Grid, Part, Parts
from qat.quant.scales import look_up


@dataclass(frozen=True)
class Even(Format):
    """The format `grid`.

    Parts, which are its operands too: `scale` [O, G] and, with shifts, `shift` [O, G].

    Attributes:
        group: columns that share a scale, a divisor of every row's length.
        shifts: whether they share a shift too.
    """

    bits: int
    group: int
    shifts: bool = False

    name = "grid"

    def settings(self) -> dict[str, Any]:
        """Bits, group and shifts."""
        return {"format": self.name, "bits": self.bits, "group": self.group, "shifts": self.shifts}

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Scales and shifts."""
        names = ("scale", "shift") if self.shifts else ("scale",)
        return {name: Part((outputs, inputs // self.group), "scales") for name in names}

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """The parts themselves."""
        return {name: value.half().float() for name, value in parts.items()} if snap else dict(parts)

    def grid(self, operands: Parts) -> Grid:
        """Even values; every weight has the scale and the shift of its group."""
        scale = operands["scale"]
        shift = self._each(operands["shift"]) if self.shifts else None
        return Grid(self.values(scale.device).expand(len(scale), -1).contiguous(), self._each(scale), shift)

    def values(self, device: torch.device) -> Tensor:
        """[K] fp32."""
        middle = 0.0 if self.shifts else (2**self.bits - 1) / 2
        return torch.arange(2**self.bits, device=device, dtype=torch.float32) - middle

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Sums over each group."""
        scale = operands["scale"]
        grad_NOI = grad_NOI.to(scale.dtype)
        values = self.values(scale.device).expand(len(scale), -1).contiguous()
        found = {"scale": self._sums(grad_NOI * look_up(values, index_NOI))}
        return found | {"shift": self._sums(grad_NOI)} if self.shifts else found

    def back(self, gradients: Parts, parts: Parts, snap: bool = False) -> Parts:
        """The operands' own."""
        return gradients

    def normalized(self, parts: Parts) -> Parts:
        """As they are."""
        return {name: value.clone() for name, value in parts.items()}

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, scales and shifts; values are known."""
        each = 32 if self.shifts else 16
        return self.bits * outputs * inputs + each * outputs * inputs // self.group

    def _each(self, of_group: Tensor) -> Tensor:
        """[N, O, G] to [N, O, I]."""
        return of_group.repeat_interleave(self.group, dim=2)

    def _sums(self, x_NOI: Tensor) -> Tensor:
        """[N, O, I] to [N, O, G]."""
        return x_NOI.unflatten(2, (-1, self.group)).sum(3)
