"""llama.cpp's k-quants: each group's scale is a small whole number times a scale in fp16.

`W = values[q] · (D · c)`, for some layouts `− M · m`: 256 weights of a row share D and M (*super-scales*, fp16), groups
of 16 or 32 of them the codes c and m. All of it is fitted and learns: codes are rounded at every write, and gradients
go straight through that (Bengio et al. 2013). So the student computes what llama.cpp decodes, to the last bit; the
layouts are those of `ggml-quants.h`.

Shapes: N layers, O outputs, I inputs, B = I / 256 blocks of a row, G groups of a row, K values, P numbers of a block.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant import least_squares
from qat.quant.curvature import Curvature
from qat.quant.formats import groups
from qat.quant.formats.base import Cluster, Equations, Fitted, Format, Grid, Misfit, Part, Parts
from qat.quant.formats.groups import each, sums
from qat.quant.least_squares import Linear
from qat.quant.lookup import look_up

BLOCK = 256  # weights of a row that share super-scales
CG_ITERATIONS = 4
ROUNDS = 2  # rounds of fitting super-scale and codes in turn, from each starting value
# Starting values of a super-scale, relative to the one under which the largest code is used
TRIED = (0.7, 0.8, 0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Layout:
    """The structure of a quantization type of llama.cpp.

    Attributes:
        lowest: of the values, which are whole numbers.
        group: weights that share a code.
        code_bits: of each code.
        shifted: whether groups have shifts, below zero.
    """

    lowest: int
    group: int
    code_bits: int
    shifted: bool

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code; negative codes exist only where values have both signs."""
        lowest = 0 if self.shifted else -(2 ** (self.code_bits - 1))
        return lowest, lowest + 2**self.code_bits - 1


LAYOUTS = {  # by bits of the index: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
    2: Layout(0, 16, 4, True),
    3: Layout(-4, 16, 6, False),
    4: Layout(0, 32, 6, True),
    5: Layout(0, 32, 6, True),
    6: Layout(-32, 16, 8, False),
}


@dataclass(frozen=True)
class KQuant(Format):
    """The format `kquant`, whose bits choose the layout.

    Parts, which are its operands too: `super_scale` [O, B] and `scale_codes` [O, G]; where there are shifts,
    `super_shift` [O, B] and `shift_codes` [O, G]. Codes are fractions while they learn.
    """

    name: ClassVar[str] = "kquant"

    @property
    def layout(self) -> Layout:
        """The layout for these bits."""
        return LAYOUTS[self.bits]

    @property
    def rowwise(self) -> tuple[str, ...]:
        """All operands."""
        return tuple(self.parts(0, 0))

    @property
    def scaled(self) -> tuple[str, ...]:
        """Super-scales."""
        return ("super_scale", "super_shift") if self.layout.shifted else ("super_scale",)

    def settings(self) -> dict[str, Any]:
        """Name and bits."""
        return {"format": self.name, "bits": self.bits}

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Super-scales and codes."""
        shared = Part((outputs, inputs // BLOCK), "scales")
        codes = Part((outputs, inputs // self.layout.group), "scales", self.layout.code_bits, self.layout.codes[0])
        pairs = {"super_scale": shared, "scale_codes": codes, "super_shift": shared, "shift_codes": codes}
        return pairs if self.layout.shifted else dict(list(pairs.items())[:2])

    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """Super-scales rounded to fp16 and codes to whole numbers, with or without `snap`."""
        return {name: self._whole(x) if name.endswith("codes") else x.half().float() for name, x in parts.items()}

    def grid(self, operands: Parts) -> Grid:
        """Whole numbers; every weight has the scale and the shift of its group."""
        scale = each(self._scale(operands), self.layout.group)
        shift = -each(self._shift(operands), self.layout.group) if self.layout.shifted else None
        return Grid(self._values(scale), scale, shift)

    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Sums over groups, for super-scales over blocks."""
        grad_NOI = grad_NOI.to(operands["super_scale"].dtype)
        found = {}
        for name, to_NOG in self._by_group(grad_NOI, look_up(self._values(grad_NOI), index_NOI)).items():
            shared, codes = operands[f"super_{name}"], operands[f"{name}_codes"]
            found[f"super_{name}"] = sums(to_NOG * codes, self._groups)
            found[f"{name}_codes"] = to_NOG * each(shared, self._groups)
        return found

    def distribute(self, gradients: Parts, parts: Parts, found: Parts, snap: bool = False) -> None:
        """Does nothing: operands are parts, and gradients pass straight through their rounding."""

    def stored(self, operands: Parts) -> Parts:
        """Super-scales in fp16, codes as whole numbers."""
        return self.operands(operands)

    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """The best scales and shifts of a few for each group by itself, then super-scales and codes for them."""
        layout = self.layout
        guessed = groups.guess(weight_NOI, h_NI, self._values(weight_NOI[0]), layout.group, layout.shifted)
        free = Grid(self._values(weight_NOI), *(each(x, layout.group) for x in guessed))
        return self._coded(guessed, free.nearest(weight_NOI), weight_NOI, h_NI)

    def alternated(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, shared: bool = True) -> Fitted:
        """Scales and shifts of groups by least squares, super-scales and codes for them, then indices."""
        return self._coded(self._each_group(fitted.operands), fitted.index_NOI, weight_NOI, h_NI)

    def refined(self, fitted: Fitted, weight_NOI: Tensor, cost: Curvature, shared: bool = True) -> Fitted:
        """Super-scales by conjugate gradients."""
        linear = self._linear(fitted, cost.inputs_NII.diagonal(dim1=1, dim2=2))
        x = torch.stack([fitted.operands[name] for name in self.scaled], 3)
        x = least_squares.conjugate_gradient(x, linear, weight_NOI, cost, CG_ITERATIONS, least_squares.ENOUGH)
        found = dict(zip(self.scaled, (part.contiguous() for part in x.unbind(3)), strict=True))
        return Fitted(fitted.index_NOI, fitted.operands | found)

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Indices, codes and super-scales: what llama.cpp's blocks take."""
        parts = self.parts(outputs, inputs).values()
        return self.bits * outputs * inputs + sum(part.bits * part.shape[0] * part.shape[1] for part in parts)

    def equations(self, outputs: int, inputs: int) -> Equations:
        """A small system for each group, and its factor."""
        systems = outputs * inputs // self.layout.group
        return Equations(2 * systems * len(self.scaled) ** 2, f"equations of groups of {self.layout.group}", "bits")

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """Why rows do not consist of whole blocks, or why there is no layout of these bits."""
        if self.bits not in LAYOUTS:
            return Misfit("bits", f"could have k-quants of {', '.join(map(str, LAYOUTS))} bits, as llama.cpp has them")
        if inputs % BLOCK == 0:
            return None
        return Misfit(
            "format",
            f"has rows of {inputs} weights, which blocks of {BLOCK} do not divide: for such rows llama.cpp has"
            " format=grid with group=32, as quant=gguf_q4_0 and its like",
        )

    @property
    def _groups(self) -> int:
        """Number of groups in a block."""
        return BLOCK // self.layout.group

    def _whole(self, codes: Tensor) -> Tensor:
        return codes.round().clamp(*self.layout.codes)

    def _values(self, like: Tensor) -> Tensor:
        """The values [N, K], fp32 or in the type of `like`, for its N layers or its single one."""
        values = torch.arange(2**self.bits, device=like.device, dtype=like.dtype) + self.layout.lowest
        return values if like.dim() == 2 else values.expand(len(like), -1).contiguous()

    def _scale(self, operands: Parts) -> Tensor:
        """The scale of each group [N, O, G]."""
        return each(operands["super_scale"], self._groups) * operands["scale_codes"]

    def _shift(self, operands: Parts) -> Tensor:
        """The shift of each group [N, O, G], which is subtracted."""
        return each(operands["super_shift"], self._groups) * operands["shift_codes"]

    def _each_group(self, operands: Parts) -> list[Tensor]:
        return [self._scale(operands), -self._shift(operands)] if self.layout.shifted else [self._scale(operands)]

    def _by_group(self, error_NOI: Tensor, value_NOI: Tensor) -> dict[str, Tensor]:
        """Gradients of each group's scale and subtracted shift [N, O, G] from the gradient of the weights."""
        scale = sums(error_NOI * value_NOI, self.layout.group)
        return {"scale": scale} | ({"shift": -sums(error_NOI, self.layout.group)} if self.layout.shifted else {})

    def _coded(self, around: list[Tensor], index_NOI: Tensor, weight_NOI: Tensor, h_NI: Tensor) -> Fitted:
        """Operands close to the least-squares solution for given indices, then the nearest indices.

        Args:
            around: scales and shifts of groups, towards which unused ones are drawn.
            index_NOI, weight_NOI, h_NI: as everywhere.
        """
        value_NOI = look_up(self._values(weight_NOI), index_NOI)
        linear = groups.linear(value_NOI, h_NI, self.layout.group, self.layout.shifted)
        best = least_squares.refit(torch.stack(around, 3), linear, weight_NOI, h_NI)
        h_NOI = h_NI[:, None].expand_as(value_NOI)
        square = sums(h_NOI * value_NOI.square(), self.layout.group)
        if not self.layout.shifted:
            shared, codes = self._project(best[..., 0], square)
            operands = {"super_scale": shared, "scale_codes": codes}
        else:
            count, product = sums(h_NOI, self.layout.group), sums(h_NOI * value_NOI, self.layout.group)
            slope = product / count  # decrease of the best shift per unit by which the scale exceeds its optimum
            shared, codes = self._project(best[..., 0], square - slope * product)
            away = each(shared, self._groups) * codes - best[..., 0]
            shift, shift_codes = self._project(slope * away - best[..., 1], count)
            operands = {"super_scale": shared, "scale_codes": codes, "super_shift": shift, "shift_codes": shift_codes}
        return Fitted(self.grid(operands).nearest(weight_NOI), operands)

    def _project(self, wanted_NOG: Tensor, importance_NOG: Tensor) -> tuple[Tensor, Tensor]:
        """Super-scales [N, O, B] and whole codes [N, O, G] whose products approximate the wanted scales."""
        lowest, largest = self.layout.codes
        wanted, weight = (x.unflatten(2, (-1, self._groups)) for x in (wanted_NOG, importance_NOG.clamp_min(1e-20)))
        top = wanted.amax(3) if lowest == 0 else wanted.abs().amax(3)
        least = torch.full_like(top, torch.inf)
        best, codes = torch.zeros_like(top), torch.zeros_like(wanted)
        for share in TRIED:
            shared = share * top.clamp_min(1e-20) / largest
            for _ in range(ROUNDS):
                tried = self._whole(wanted / shared[..., None])
                square = (weight * tried.square()).sum(3)
                shared = ((weight * wanted * tried).sum(3) / square.clamp_min(1e-30)).clamp_min(1e-20)
            tried = self._whole(wanted / shared[..., None])
            error = (weight * (wanted - shared[..., None] * tried).square()).sum(3)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, shared, best)
            codes = torch.where(better[..., None], tried, codes)
        return best, codes.flatten(2)

    def _linear(self, fitted: Fitted, h_NI: Tensor) -> Linear:
        """The quantized weight as a function of super-scales [N, O, B, P]."""
        operands, size = fitted.operands, self.layout.group
        of = [look_up(self._values(operands["super_scale"]), fitted.index_NOI) * each(operands["scale_codes"], size)]
        if self.layout.shifted:
            of.append(-each(operands["shift_codes"], size))
        return groups.combined(of, h_NI, BLOCK)
