"""Fixed values with a scale, and perhaps a shift, for each group of columns in a row, as most engines use.

`W = values[q] · s`, or `values[q] · s + z` where groups have shifts. Which values there are is a setting (`LEVELS`);
scales and shifts are fitted and learn. Files hold them in fp16, so weights are computed with what fp16 makes of them,
at every write of training too: what is evaluated is what an engine decodes, to the last bit.

Shapes: N layers, O outputs, I inputs, K = 2^bits values, G groups of a row, P numbers of a group (scale, shift).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.config import USUAL_GROUPS
from qat.quant import least_squares
from qat.quant.curvature import Curvature
from qat.quant.formats import groups
from qat.quant.formats.base import Cluster, Equations, Fitted, Format, Grid, Kernels, Misfit, Part, Parts
from qat.quant.least_squares import Linear
from qat.quant.lookup import look_up, together

CG_ITERATIONS = 4
# The values by levels and bits, ascending: `integers` are those of llama.cpp's Q4_0 and Q8_0 and of
# symmetric integers in compressed-tensors; `shifted` ones, which have a shift besides, those of MLX and of Q4_1;
# `iq4nl` those of llama.cpp's IQ4_NL, dense around zero as weights are.
LEVELS: dict[str, Callable[[int], Tensor]] = {
    "halves": lambda bits: torch.arange(2**bits) - (2**bits - 1) / 2,
    "integers": lambda bits: torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)),
    "shifted": lambda bits: torch.arange(2**bits),
    "iq4nl": lambda bits: torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
}
SHIFTED = "shifted"


@dataclass(frozen=True)
class GroupGrid(Format):
    """The format `grid`.

    Parts, which are its operands too: `scale` [O, G] and, with shifts, `shift` [O, G].

    Attributes:
        group: columns that share a scale, a divisor of every row's length.
        levels: which values there are, a key of `LEVELS`.
    """

    group: int
    levels: str = "halves"

    name: ClassVar[str] = "grid"

    @property
    def shifts(self) -> bool:
        """Whether groups have shifts."""
        return self.levels == SHIFTED

    @property
    def rowwise(self) -> tuple[str, ...]:
        """All operands."""
        return ("scale", "shift") if self.shifts else ("scale",)

    def settings(self) -> dict[str, Any]:
        """Name, bits, group and levels."""
        return {"format": self.name, "bits": self.bits, "group": self.group, "levels": self.levels}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "GroupGrid":
        """From settings; older files have `shifts` instead of `levels`."""
        older = SHIFTED if settings.get("shifts") else "halves"
        return cls(settings["bits"], settings["group"], settings.get("levels", older))

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Scales and shifts."""
        return {name: Part((outputs, inputs // self.group), "scales") for name in self.rowwise}

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """The parts rounded to fp16, with or without `snap`."""
        return {name: part.half().float() for name, part in parts.items()}

    def grid(self, operands: Parts) -> Grid:
        """Every weight has the scale and the shift of its group."""
        shift = groups.each(operands["shift"], self.group) if self.shifts else None
        return Grid(self._values(operands["scale"]), groups.each(operands["scale"], self.group), shift)

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Sums over each group."""
        scale = operands["scale"]
        grad_NOI = grad_NOI.to(scale.dtype)
        found = {"scale": groups.sums(grad_NOI * look_up(self._values(scale), index_NOI), self.group)}
        return found | {"shift": groups.sums(grad_NOI, self.group)} if self.shifts else found

    def distribute(self, gradients: Parts, parts: Parts, found: Parts, snap: bool = False) -> None:
        """Does nothing: operands are parts, and gradients pass straight through their rounding."""

    def stored(self, operands: Parts) -> Parts:
        """The parts in fp16."""
        return self.operands(operands)

    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """The best of several candidate scales and shifts, then nearest indices."""
        guessed = groups.guess(weight_NOI, h_NI, self._values(weight_NOI[0]), self.group, self.shifts)
        operands = dict(zip(self.rowwise, guessed, strict=True))
        return Fitted(self.grid(operands).nearest(weight_NOI), operands)

    def alternated(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, shared: bool = True) -> Fitted:
        """Scales and shifts by least squares, then indices."""
        parts = [self._round(self._rows(fitted, rows), weight_NOI[:, rows], h_NI) for rows in together(weight_NOI)]
        operands = {name: torch.cat([part.operands[name] for part in parts], 1) for name in self.rowwise}
        return Fitted(torch.cat([part.index_NOI for part in parts], 1), operands)

    def refined(self, fitted: Fitted, weight_NOI: Tensor, cost: Curvature, shared: bool = True) -> Fitted:
        """Scales and shifts by conjugate gradients."""
        linear = self._linear(fitted, cost.inputs_NII.diagonal(dim1=1, dim2=2))
        x = self._together(fitted.operands)
        x = least_squares.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS, least_squares.ENOUGH)
        return Fitted(fitted.index_NOI, self._named(x))

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, scales and shifts; values are known."""
        return self.bits * outputs * inputs + 16 * len(self.rowwise) * outputs * inputs // self.group

    def equations(self, outputs: int, inputs: int) -> Equations:
        """A small system for each group, and its factor."""
        systems = outputs * inputs // self.group
        return Equations(2 * systems * len(self.rowwise) ** 2, f"equations of groups of {self.group}", "group")

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """Why rows do not consist of whole groups, or why the levels do not suit the bits."""
        if 2**self.bits != len(LEVELS[self.levels](self.bits)):
            return Misfit("levels", f"has indices of {self.bits} bits, and these levels are sixteen: 4 bits")
        if inputs % self.group == 0:
            return None
        divisors = (size for size in range(1, inputs + 1) if inputs % size == 0)
        nearest = min(divisors, key=self._apart)
        return Misfit(
            "group",
            f"has rows of {inputs} weights, which groups of {self.group} do not divide: groups of {nearest} do, and"
            " format=codebook, as in quant=q2a4, takes rows of any length",
        )

    def kernels(self, device: torch.device) -> Kernels | None:
        """Triton kernels on CUDA."""
        if device.type != "cuda":
            return None
        from qat.quant.formats import grid_kernels

        values = tuple(map(float, LEVELS[self.levels](self.bits)))
        return grid_kernels.GridKernels(values, self.group) if grid_kernels.AVAILABLE else None

    def _apart(self, group: int) -> tuple[bool, float]:
        """How far another group size is from this one, of which those that engines take come first."""
        return group not in USUAL_GROUPS, max(group, self.group) / min(group, self.group)

    def _round(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor) -> Fitted:
        linear = self._linear(fitted, h_NI)
        operands = self._named(least_squares.refit(self._together(fitted.operands), linear, weight_NOI, h_NI))
        return Fitted(self.grid(operands).nearest(weight_NOI), operands)

    def _rows(self, fitted: Fitted, rows: slice) -> Fitted:
        return Fitted(fitted.index_NOI[:, rows], {name: x[:, rows] for name, x in fitted.operands.items()})

    def _linear(self, fitted: Fitted, h_NI: Tensor) -> Linear:
        """The quantized weight as a function of scales and shifts [N, O, G, P]."""
        value_NOI = look_up(self._values(fitted.operands["scale"]), fitted.index_NOI)
        return groups.linear(value_NOI, h_NI, self.group, self.shifts)

    def _together(self, operands: Parts) -> Tensor:
        """Scales and shifts as one tensor [N, O, G, P]."""
        return torch.stack([operands[name] for name in self.rowwise], 3)

    def _named(self, x: Tensor) -> Parts:
        return {name: part.contiguous() for name, part in zip(self.rowwise, x.unbind(3), strict=True)}

    def _values(self, like: Tensor) -> Tensor:
        """The values [N, K], fp32 or in the type of `like`, for its N layers or its single one."""
        values = LEVELS[self.levels](self.bits).to(like)
        return values if like.dim() == 2 else values.expand(len(like), -1).contiguous()
