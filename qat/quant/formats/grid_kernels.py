"""Triton kernels of the format `grid`: weights written, and their gradients reduced, each in one pass.

One launch serves all layers of a stack. A program has some rows of one group of columns, so that what it sums is
whole when it ends.

Shapes: N layers, O outputs, I inputs, G groups of a row.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from qat.quant.formats.base import ALIGNMENT, Parts

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    AVAILABLE = False
else:
    AVAILABLE = True

TILE = 4096  # weights that a program processes


@dataclass(frozen=True)
class GridKernels:
    """`Kernels` of one grid: `weight = values[index] · scale + shift`.

    Attributes:
        values: ascending.
        group: columns that share a scale.
    """

    values: tuple[float, ...]
    group: int

    def write(self, indices: Tensor, operands: Parts, latent: Tensor | None, weights: Tensor, starts: Tensor) -> None:
        """As `Kernels.write`; scale and, if there is one, shift are [N, O, G]."""
        scale, shift = operands["scale"].contiguous(), operands.get("shift")
        launch, sizes, constants = self._shape(indices)
        _write[launch](
            indices,
            scale,
            scale if shift is None else shift.contiguous(),
            indices if latent is None else latent,
            weights,
            starts,
            *sizes,
            SHIFT=shift is not None,
            LATENT=latent is not None,
            **constants,
        )

    def gradients(self, grads: Tensor, starts: Tensor, indices: Tensor, operands: Parts, found: Parts) -> None:
        """As `Kernels.gradients`: sums over each group."""
        d_scale, d_shift = found["scale"], found.get("shift", found["scale"])
        launch, sizes, constants = self._shape(indices)
        _reduce[launch](grads, starts, indices, d_scale, d_shift, *sizes, SHIFT="shift" in found, **constants)

    def _shape(self, indices: Tensor) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, Any]]:
        layers, outputs, inputs = indices.shape
        columns = triton.next_power_of_2(self.group)
        rows = max(1, TILE // columns)
        launch = (inputs // self.group, triton.cdiv(outputs, rows), layers)
        even = all(after - before == 1 for before, after in pairwise(self.values))
        values = (self.values[0], self.values[-1]) if even else self.values
        constants = {"VALUES": values, "EVEN": even, "GROUP": self.group, "ROWS": rows, "COLUMNS": columns}
        return launch, (outputs, inputs), constants


if AVAILABLE:
    BEGIN = tl.constexpr(ALIGNMENT)
    SMALLEST = tl.constexpr(1.1754943508222875e-38)  # replaces scales of zero: the smallest normal fp32 number

    @triton.jit
    def _tile(starts, outputs, inputs, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Where a program's weights lie in a stack and in the flat weights, which are there, its groups and rows."""
        layer, group = tl.program_id(2).to(tl.int64), tl.program_id(0)
        o, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        inside = (o[:, None] < outputs) & (column[None, :] < GROUP)
        within = o[:, None] * inputs + group * GROUP + column[None, :]
        place = layer * outputs * inputs + within
        there = tl.multiple_of(tl.load(starts + layer), BEGIN) + within
        of_group = (layer * outputs + o) * (inputs // GROUP) + group
        return place, there, inside, of_group, o < outputs

    @triton.jit
    def _value(index, VALUES: tl.constexpr, EVEN: tl.constexpr):
        """Values, fp32, at some indices; if they are evenly spaced by one, `VALUES` has only the first and the last."""
        if EVEN:
            return index.to(tl.float32) + VALUES[0]
        found = tl.zeros(index.shape, tl.float32)
        for k in tl.static_range(len(VALUES)):
            found = tl.where(index == k, VALUES[k], found)
        return found

    @triton.jit
    def _nearest(wanted, VALUES: tl.constexpr, EVEN: tl.constexpr):
        """Indices, int32, of the values nearest to some numbers; ties go to the larger one."""
        if EVEN:
            above = tl.floor(wanted - VALUES[0] + 0.5)
            return tl.minimum(tl.maximum(above, 0.0), VALUES[1] - VALUES[0]).to(tl.int32)
        chosen = tl.zeros(wanted.shape, tl.int32)
        for k in tl.static_range(1, len(VALUES)):
            chosen += (wanted >= (VALUES[k - 1] + VALUES[k]) / 2).to(tl.int32)
        return chosen

    @triton.jit
    def _write(
        indices,
        scale,
        shift,
        latent,
        weights,
        starts,
        outputs,
        inputs,
        SHIFT: tl.constexpr,
        LATENT: tl.constexpr,
        VALUES: tl.constexpr,
        EVEN: tl.constexpr,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        place, there, inside, of_group, row = _tile(starts, outputs, inputs, GROUP, ROWS, COLUMNS)
        s = tl.load(scale + of_group, mask=row, other=1.0)[:, None]
        z = tl.zeros_like(s)
        if SHIFT:
            z = tl.load(shift + of_group, mask=row, other=0.0)[:, None]
        if LATENT:
            divisor = tl.where(tl.abs(s) < SMALLEST, SMALLEST, s)
            wanted = (tl.load(latent + place, mask=inside, other=0.0) - z) / divisor
            chosen = _nearest(wanted, VALUES, EVEN)
            tl.store(indices + place, chosen.to(tl.uint8), mask=inside)
        else:
            chosen = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        value = _value(chosen, VALUES, EVEN) * s + z
        tl.store(weights + there, value.to(weights.dtype.element_ty), mask=inside)

    @triton.jit
    def _reduce(
        grads,
        starts,
        indices,
        d_scale,
        d_shift,
        outputs,
        inputs,
        SHIFT: tl.constexpr,
        VALUES: tl.constexpr,
        EVEN: tl.constexpr,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        place, there, inside, of_group, row = _tile(starts, outputs, inputs, GROUP, ROWS, COLUMNS)
        g = tl.load(grads + there, mask=inside, other=0.0).to(tl.float32)
        value = _value(tl.load(indices + place, mask=inside, other=0).to(tl.int32), VALUES, EVEN)
        tl.store(d_scale + of_group, tl.sum(g * value, 1), mask=row)
        if SHIFT:
            tl.store(d_shift + of_group, tl.sum(g, 1), mask=row)
