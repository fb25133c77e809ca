"""Evenly spaced values, a scale for each group of a row's columns and perhaps a shift: what most engines run.

Without shifts values lie around zero, half of them on either side (−1.5, −0.5, 0.5, 1.5), and all of them are used:
`W = (q − (2^bits − 1) / 2) · s` with `q` from 0 to 2^bits − 1. With shifts `W = q · s + z`, which is the affine form
of MLX and of llama.cpp's Q4_1. Values are fixed; scales and shifts are fitted and learn.

Shapes: N layers, O outputs, I inputs, K = 2^bits values, G groups of a row, P numbers of a group (scale, shift).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant import least_squares
from qat.quant.curvature import Curvature
from qat.quant.formats.base import Cluster, Equations, Fitted, Format, Grid, Misfit, Part, Parts
from qat.quant.least_squares import Linear
from qat.quant.lookup import look_up

CG_ITERATIONS = 4
# Distance, in standard deviations, of so many values at which a normal distribution loses least (Max 1960, table II).
STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}
RANGE = 6  # standard deviations that more values cover


@dataclass(frozen=True)
class Uniform(Format):
    """The format `grid`.

    Parts, which are its operands too: `scale` [O, G] and, with shifts, `shift` [O, G].

    Attributes:
        group: columns that share a scale, a divisor of every row's length.
        shifts: whether they share a shift too.
    """

    group: int
    shifts: bool = False

    name: ClassVar[str] = "grid"

    @property
    def rowwise(self) -> tuple[str, ...]:
        """All of them."""
        return ("scale", "shift") if self.shifts else ("scale",)

    def settings(self) -> dict[str, Any]:
        """Name, bits, group and shifts."""
        return {"format": self.name, "bits": self.bits, "group": self.group, "shifts": self.shifts}

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Scales and shifts."""
        return {name: Part((outputs, inputs // self.group), "scales") for name in self.rowwise}

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """The parts themselves."""
        return {name: part.half().float() for name, part in parts.items()} if snap else dict(parts)

    def grid(self, operands: Parts) -> Grid:
        """Even values; every weight has the scale and the shift of its group."""
        shift = self._each(operands["shift"]) if self.shifts else None
        return Grid(self._values(operands["scale"]), self._each(operands["scale"]), shift)

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Sums over each group."""
        scale = operands["scale"]
        grad_NOI = grad_NOI.to(scale.dtype)
        found = {"scale": self._sums(grad_NOI * look_up(self._values(scale), index_NOI))}
        return found | {"shift": self._sums(grad_NOI)} if self.shifts else found

    def distribute(self, gradients: Parts, parts: Parts, found: Parts, snap: bool = False) -> None:
        """Nothing to do: operands are parts."""

    def stored(self, operands: Parts) -> Parts:
        """As they are."""
        return operands

    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """The best grid for a normal distribution of each group's mean square, or variance with shifts."""
        return self._started(weight_NOI)

    def _started(self, weight_NOI: Tensor) -> Fitted:
        groups = weight_NOI.unflatten(2, (-1, self.group))
        mean = groups.mean(3) if self.shifts else torch.zeros_like(groups[..., 0])
        deviation = (groups - mean[..., None]).square().mean(3).sqrt()
        scale = STEPS.get(self.bits, RANGE / 2**self.bits) * deviation
        operands = {"scale": scale} | ({"shift": mean - self._half * scale} if self.shifts else {})
        return Fitted(self.grid(operands).nearest(weight_NOI), operands)

    def continued(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor) -> Fitted:
        """Rows have nothing in common."""
        return self._started(weight_NOI)

    def alternated(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, shared: bool = True) -> Fitted:
        """Scales and shifts by least squares, then indices."""
        linear = self._linear(fitted, h_NI)
        operands = self._named(least_squares.refit(self._together(fitted.operands), linear, weight_NOI, h_NI))
        return Fitted(self.grid(operands).nearest(weight_NOI), operands)

    def refined(self, fitted: Fitted, weight_NOI: Tensor, cost: Curvature, shared: bool = True) -> Fitted:
        """Scales and shifts by conjugate gradients."""
        linear = self._linear(fitted, cost.inputs_NII.diagonal(dim1=1, dim2=2))
        x = self._together(fitted.operands)
        x = least_squares.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS)
        return Fitted(fitted.index_NOI, self._named(x))

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, scales and shifts; values are known."""
        return self.bits * outputs * inputs + 16 * len(self.rowwise) * outputs * inputs // self.group

    def equations(self, outputs: int, inputs: int) -> Equations:
        """A small system for each group, and its factor."""
        systems = outputs * inputs // self.group
        return Equations(2 * systems * len(self.rowwise) ** 2, f"equations of groups of {self.group}", "group")

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """Rows consist of whole groups."""
        if inputs % self.group == 0:
            return None
        return Misfit("group", f"has rows of {inputs} weights, which groups of {self.group} do not divide")

    def _linear(self, fitted: Fitted, h_NI: Tensor) -> Linear:
        """The quantized weight as a function of scales and shifts [N, O, G, P]."""
        Q = look_up(self._values(fitted.operands["scale"]), fitted.index_NOI)
        of = torch.stack([Q, torch.ones_like(Q)] if self.shifts else [Q])  # what each number is multiplied with
        importance = h_NI[:, None].expand_as(Q)
        gram = [torch.stack([self._sums(a * b * importance) for b in of], 3) for a in of]
        return Linear(
            lambda x: torch.stack([self._each(x[..., p]) * of[p] for p in range(len(of))]).sum(0),
            lambda E: torch.stack([self._sums(E * one) for one in of], 3),
            least_squares.solver(torch.stack(gram, 3)),
            (2, 3),
        )

    def _together(self, operands: Parts) -> Tensor:
        """[N, O, G, P]."""
        return torch.stack([operands[name] for name in self.rowwise], 3)

    def _named(self, x: Tensor) -> Parts:
        return {name: part.contiguous() for name, part in zip(self.rowwise, x.unbind(3), strict=True)}

    @property
    def _half(self) -> float:
        """The middle of the values from 0 up."""
        return (2**self.bits - 1) / 2

    def _values(self, like: Tensor) -> Tensor:
        """[N, K] fp32 or whatever `like` is, which has N layers or is one."""
        values = torch.arange(2**self.bits, device=like.device, dtype=like.dtype)
        values = values if self.shifts else values - self._half
        return values if like.dim() == 2 else values.expand(len(like), -1).contiguous()

    def _each(self, of_group: Tensor) -> Tensor:
        """[N, O, G] to [N, O, I]."""
        return of_group.repeat_interleave(self.group, dim=-1)

    def _sums(self, x_NOI: Tensor) -> Tensor:
        """[N, O, I] to [N, O, G]."""
        return x_NOI.unflatten(-1, (-1, self.group)).sum(-1)
