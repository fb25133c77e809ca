"""What a quantized weight is: an index for each weight into a few values, which are scaled and perhaps shifted.

`W = values[index] ⊙ S + Z`. A format says what values, S and Z are made of: its *parts*, fp32 tensors that learn,
each like others of its kind. W is linear in its *operands*, which follow from the parts (a product of two of them,
or a part as it is stored). Everything else that handles quantized weights (stacks, learners, checkpoints, packed
files, exports) asks the format, so that a new one is a new file here.

All tensors have a first dimension for layers of one shape that are handled together. Shapes: N layers, O outputs,
I inputs, K values.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.quant.codebook import nearest, relative
from qat.quant.scales import look_up

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor that a layer has in a format.

    Attributes:
        shape: without the layers.
        kind: whose learning rate it has (a field of `train.learn`).
    """

    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Grid:
    """Where the weights of some layers may lie.

    Attributes:
        values_NK: in any order.
        scale_NOI: of each weight.
        shift_NOI: of each weight; None where there is none.
    """

    values_NK: Tensor
    scale_NOI: Tensor
    shift_NOI: Tensor | None = None

    def at(self, index_NOI: Tensor) -> Tensor:
        """The weights [N, O, I] at some indices."""
        scaled = look_up(self.values_NK, index_NOI) * self.scale_NOI
        return scaled if self.shift_NOI is None else scaled + self.shift_NOI

    def relative(self, weight_NOI: Tensor) -> Tensor:
        """Weights as values before they are scaled and shifted."""
        return relative(weight_NOI if self.shift_NOI is None else weight_NOI - self.shift_NOI, self.scale_NOI)

    def nearest(self, weight_NOI: Tensor) -> Tensor:
        """The index [N, O, I], uint8, at which each weight is nearest to what it is.

        Values need not be sorted: training may let two of them pass each other.
        """
        ascending_NK, order_NK = self.values_NK.sort(dim=1)
        return look_up(order_NK, nearest(self.relative(weight_NOI), ascending_NK)).to(torch.uint8)


class Format(ABC):
    """One way to write weights in few bits.

    Attributes:
        name: what it is called in configurations and files.
        bits: of an index, 1 to 8.
    """

    name: str
    bits: int

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What manifests say of it; `formats.of` makes it from that again."""

    @abstractmethod
    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """The tensors of a layer by name, indices apart, in the order in which they are stored."""

    @abstractmethod
    def operands(self, parts: Parts, snap: bool = False) -> Parts:
        """What weights are linear in, fp32; with `snap` as a file in fp16 would hold it."""

    @abstractmethod
    def grid(self, operands: Parts) -> Grid:
        """Values, scales and shifts."""

    @abstractmethod
    def gradients(self, grad_NOI: Tensor, index_NOI: Tensor, operands: Parts) -> Parts:
        """Gradients of the operands from that of the weights (any floating type; reduced in fp32)."""

    @abstractmethod
    def back(self, gradients: Parts, parts: Parts, snap: bool = False) -> Parts:
        """Gradients of the parts from those of the operands; straight through what `snap` rounds."""

    @abstractmethod
    def normalized(self, parts: Parts) -> Parts:
        """Parts of the same weights as they are stored."""

    @abstractmethod
    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Bits of a whole layer in a file, parts in 16."""

    def weight(self, index_NOI: Tensor, parts: Parts) -> Tensor:
        """W [N, O, I] fp32."""
        return self.grid(self.operands(parts)).at(index_NOI)

    def kernels(self, device: torch.device) -> Any:
        """The module with fused forms of writing and reducing, where the device has them; see `table_kernels`."""
        return None
