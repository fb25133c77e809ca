"""What all peers have in common: groups of weights on a uniform grid, its cost in bits, and the proof of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from qat.errors import ConfigError, NumericsError

SCALE_BITS = 16


@dataclass(frozen=True)
class Grid:
    """How a layer is stored: `group` consecutive inputs of a row share a scale and a zero point.

    Attributes:
        bits: of an index.
        group: weights.
        zero_bits: of a zero point.
    """

    bits: int
    group: int
    zero_bits: int

    @property
    def bits_per_weight(self) -> float:
        """Index bits, and a group's share of its scale and zero point."""
        return self.bits + (SCALE_BITS + self.zero_bits) / self.group


def parse(text: str) -> tuple[int, int]:
    """Bits and group of `2:64`.

    Raises:
        ConfigError: it is not of that form.
    """
    bits, colon, group = text.partition(":")
    if not (colon and bits.isdecimal() and group.isdecimal() and 1 <= int(bits) <= 8 and int(group) > 0):
        raise ConfigError(f"{text} is not bits:group, such as 2:64 for 2 bits in groups of 64")
    return int(bits), int(group)


def mean_bits(parts: Iterable[tuple[int, float]]) -> float:
    """Mean bits per weight over layers of so many weights at so many bits each."""
    parts = list(parts)
    return sum(weights * bits for weights, bits in parts) / sum(weights for weights, _ in parts)


def levels(weight_OI: Tensor, group: int) -> int:
    """The most distinct values that any group of a weight holds."""
    ascending = weight_OI.reshape(-1, group).sort(dim=1).values
    return 1 + int((ascending.diff(dim=1) != 0).sum(1).max())


def prove(name: str, weight_OI: Tensor, original_OI: Tensor, grid: Grid) -> int:
    """Makes sure that a weight is quantized, and from the original; its `levels`.

    Raises:
        NumericsError: another shape, a group with more values than its bits can tell apart, or an error as large as
            the weight itself, which no method makes and a mistaken zero point does.
    """
    if weight_OI.shape != original_OI.shape:
        raise NumericsError(f"{name} came back as {tuple(weight_OI.shape)}, not as {tuple(original_OI.shape)}")
    found = levels(weight_OI, grid.group)
    if found > 2**grid.bits:
        raise NumericsError(
            f"{name} is not quantized: a group of {grid.group} holds {found} values where {grid.bits} bits tell"
            f" {2**grid.bits} apart"
        )
    error = float((weight_OI - original_OI).square().sum() / original_OI.square().sum())
    if not error < 1:
        raise NumericsError(f"{name} is another weight: its squared error is {error:.2f} of the weight's square")
    return found
