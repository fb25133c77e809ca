"""What a quantized weight is: an index for each weight into a few values, which are scaled and perhaps shifted.

`W = values[index] ⊙ S + Z`. A value may be a vector for several weights of a row, which then share an index. A format
says what values, S and Z are made of: its *parts*, fp32 tensors that learn, each like others of its kind. W is linear
in its *operands*, which follow from the parts (a product of two of them, or a part as it is stored). Everything else
that handles quantized weights (stacks, learners, checkpoints, packed files, exports, conversion) asks the format, so
that a new one is a new file here.

Shapes: N layers of one shape that are handled together, O outputs, I inputs, K values, D numbers of a vector. Where
nothing else is said, N may be left out of all tensors for a single layer; indices [N, O, I] are [N, O, I / D] where
values are vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qat.quant.curvature import Curvature
from qat.quant.lookup import are_vectors, look_up, nearest, nearest_vector, relative

Parts = dict[str, Tensor]
Cluster = Callable[[Tensor, Tensor, int], Tensor]  # the best values [N, K] for numbers [N, M] and their importance
Product = Callable[[Tensor, Tensor, Parts], Tensor]  # `W x` [O] from x [I], a bit stream of indices, and parts in fp16


@dataclass(frozen=True)
class Part:
    """A tensor that a layer has in a format.

    Attributes:
        shape: of one layer.
        kind: whose learning rate it has (a field of `train.learn`).
        bits: that a number of it takes in a file: 16 in fp16, else a whole number of so many bits.
        lowest: the least of the whole numbers.
    """

    shape: tuple[int, ...]
    kind: str
    bits: int = 16
    lowest: int = 0


@dataclass(frozen=True)
class Grid:
    """The values that the weights of some layers can take.

    Attributes:
        values_NK: in any order; or vectors [N, K, D].
        scale_NOI: of each weight.
        shift_NOI: of each weight; None where there is none.
    """

    values_NK: Tensor
    scale_NOI: Tensor
    shift_NOI: Tensor | None = None

    def at(self, index_NOI: Tensor) -> Tensor:
        """The weights [N, O, I] at some indices."""
        scaled = look_up(self.values_NK, index_NOI).mul_(self.scale_NOI)
        return scaled if self.shift_NOI is None else scaled.add_(self.shift_NOI)

    def absolute(self, value_NOI: Tensor) -> Tensor:
        """Values scaled and shifted."""
        scaled = value_NOI * self.scale_NOI
        return scaled if self.shift_NOI is None else scaled + self.shift_NOI

    def unshifted(self, weight_NOI: Tensor) -> Tensor:
        """Weights minus the shifts, which scaled values have to match."""
        return weight_NOI if self.shift_NOI is None else weight_NOI - self.shift_NOI

    def relative(self, weight_NOI: Tensor) -> Tensor:
        """Weights as values before scaling and shifting."""
        return relative(self.unshifted(weight_NOI), self.scale_NOI)

    def nearest(self, weight_NOI: Tensor) -> Tensor:
        """The index [N, O, I] of the grid value nearest to each weight, uint8, or int16 of more than 256 vectors.

        Values need not be sorted: training may let two of them pass each other. Where the scale is zero, all are
        equally near.
        """
        if are_vectors(self.values_NK, weight_NOI):
            return nearest_vector(self.unshifted(weight_NOI), self.scale_NOI, self.values_NK)
        ascending_NK, order_NK = self.values_NK.sort(dim=-1)
        return look_up(order_NK.to(torch.uint8), nearest(self.unshifted(weight_NOI) / self.scale_NOI, ascending_NK))


@dataclass(frozen=True)
class Fitted:
    """Quantized layers, N of them: their indices, and the operands of their format."""

    index_NOI: Tensor  # uint8, or int16 of more than 256 values
    operands: Parts


@dataclass(frozen=True)
class Misfit:
    """Why a format does not suit a layer: the setting to change, and the property of the layer that is the reason."""

    setting: str
    why: str


@dataclass(frozen=True)
class Equations:
    """The linear systems that a fit holds at one time: size, description, and the setting that they grow with."""

    numbers: int
    what: str
    setting: str


ALIGNMENT = 16  # weights begin at multiples of this many numbers, so that kernels can read and write several at once


class Kernels(Protocol):
    """Computes weights and gradients of a stack of layers, each in one pass or two over memory."""

    def write(self, indices: Tensor, operands: Parts, latent: Tensor | None, weights: Tensor, starts: Tensor) -> None:
        """Weights from indices and operands; with latent weights, indices are first set to the nearest.

        Args:
            indices: [N, O, I] uint8; of vectors as `Format.indices` says.
            operands: each [N, …] fp32.
            latent: [N, O, I] fp32 or None.
            weights: flat, in any floating type: where a layer's [O, I] begins, it is overwritten.
            starts: [N] int64, where the layers begin, multiples of `ALIGNMENT`; see `qat.quant.weights`.
        """

    def gradients(self, grads: Tensor, starts: Tensor, indices: Tensor, operands: Parts, found: Parts) -> None:
        """Gradients of operands, written over `found`, from those of the weights, which lie as in `write`."""


@dataclass(frozen=True)
class Format(ABC):
    """One way to write weights in few bits.

    Attributes:
        name: what it is called in configurations and files.
        bits: of indices for each weight, 1 to 8.
    """

    bits: int

    name: ClassVar[str]

    @property
    @abstractmethod
    def rowwise(self) -> tuple[str, ...]:
        """The operands [O, …] that have one row for each row of W."""

    @property
    def scaled(self) -> tuple[str, ...]:
        """The row-wise operands that scale with W's rows."""
        return self.rowwise

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Format":
        """From `settings`, those of older files included."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The format as written to files; `formats.of` reads it."""

    @abstractmethod
    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """The tensors of a layer by name, indices apart, in a fixed order, which training states rely on."""

    @property
    def dim(self) -> int:
        """How many weights of a row share an index, a divisor of every row's length."""
        return 1

    def indices(self, outputs: int, inputs: int) -> Part:
        """The indices of a layer: their shape, and bits of each."""
        return Part((outputs, inputs // self.dim), "indices", self.bits * self.dim)

    @abstractmethod
    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """The tensors that weights are linear in, fp32; with `snap`, or if all files do so, rounded as in fp16 files.

        An operand with the name of a part has that part's gradient.
        """

    @abstractmethod
    def grid(self, operands: Parts) -> Grid:
        """Values, scales and shifts."""

    @abstractmethod
    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Gradients of the operands from that of the weights (any floating type; reduced in fp32)."""

    @abstractmethod
    def distribute(self, gradients: Parts, parts: Parts, found: Parts, snap: bool = False) -> None:
        """Turns gradients of operands into those of the parts they are made of, written to `found`.

        They go straight through what `snap` rounds. Nothing to do where every operand is a part.
        """

    @abstractmethod
    def stored(self, operands: Parts) -> Parts:
        """The parts of these operands, as they are stored."""

    def normalized(self, parts: Parts) -> Parts:
        """Parts of the same weights in their stored form."""
        return {name: part.clone() for name, part in self.stored(self.operands(parts)).items()}

    def kept(self, parts: Parts, older: "Format") -> Parts | None:
        """The parts in this format for weights of an older format with the same indices; None where impossible."""
        return dict(parts) if older == self else None

    @abstractmethod
    def start(self, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """The fit's beginning (`qat.quant.fit`): indices and operands of a first guess.

        Args:
            weight_NOI: fp32.
            h_NI: importance of columns.
            cluster: makes the first values from relative weights and their importance, if values are learned.
        """

    def continued(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, cluster: Cluster) -> Fitted:
        """Like `start`, for further rows of fitted matrices; only `rowwise` operands change.

        Rows are fitted from scratch unless a format has operands that rows share.
        """
        return self.start(weight_NOI, h_NI, cluster)

    @abstractmethod
    def alternated(self, fitted: Fitted, weight_NOI: Tensor, h_NI: Tensor, shared: bool = True) -> Fitted:
        """One round: operands, each better under a diagonal importance given the rest, then the nearest indices.

        Without `shared` no others than `rowwise` change.
        """

    @abstractmethod
    def refined(self, fitted: Fitted, weight_NOI: Tensor, cost: Curvature, shared: bool = True) -> Fitted:
        """Operands fitted under the whole curvature with fixed indices; `shared` as in `alternated`."""

    @abstractmethod
    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Bits of a whole layer in a file, parts in 16."""

    @abstractmethod
    def equations(self, outputs: int, inputs: int) -> Equations:
        """The linear systems that a layer's fit solves at one time."""

    def misfit(self, outputs: int, inputs: int) -> Misfit | None:
        """Why a layer of this shape cannot have the format; None if it can."""
        return None

    def weight(self, index_NOI: Tensor, parts: Parts) -> Tensor:
        """W [N, O, I] fp32."""
        return self.grid(self.operands(parts)).at(index_NOI)

    def kernels(self, device: torch.device) -> Kernels | None:
        """Fused forms of writing and reducing, where the device has them."""
        return None

    def product(self) -> Product | None:
        """A fused product of one token with a packed layer on CUDA, where there is one; see `codebook_product`."""
        return None
