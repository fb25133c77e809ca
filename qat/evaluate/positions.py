"""KL against position: whether a student keeps to its teacher as a text grows long.

A position is the number of tokens that come before the one that was read last, in its document or in its window of
a text, so a row of 2,048 tokens has positions 0 to 2,046 from which a next token is predicted. Positions are counted
in bins, four to a doubling, and reported in bands, of which the first has 64 positions and each other one as many as
all before it.

Shapes: N rows, B bins, X positions that count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qat.evaluate.intervals import interval

FIRST = 64  # positions of the first band
STEPS = 4  # bins to a doubling


@dataclass(frozen=True)
class Band:
    """The positions from `first` to before `end`: mean KL in nats, the ends of its interval, how many there were."""

    first: int
    end: int
    kl: float
    low: float
    high: float
    count: int

    @property
    def key(self) -> str:
        """Its name in a record: `kl_64_128`."""
        return f"kl_{self.first}_{self.end}"


class Positions:
    """Sums of KL over the positions of each row that fall into a bin.

    Attributes:
        edges: where bins begin, and where the last one ends.
        sums_NB: nats, float64.
        counts_NB: positions that count.
    """

    def __init__(self, rows: int, length: int) -> None:
        """Of rows of `length` tokens, none seen yet."""
        self.edges = list(_edges(length))
        self.sums_NB = torch.zeros(rows, len(self.edges) - 1, dtype=torch.float64)
        self.counts_NB = torch.zeros_like(self.sums_NB)

    def add(self, row_X: Tensor, place_X: Tensor, kl_X: Tensor) -> None:
        """Takes some positions: their rows, what comes before each, and their KL in nats; all on the CPU."""
        bin_X = torch.bucketize(place_X, torch.tensor(self.edges), right=True) - 1
        self.sums_NB.index_put_((row_X, bin_X), kl_X.double(), accumulate=True)
        self.counts_NB.index_put_((row_X, bin_X), torch.ones_like(kl_X, dtype=torch.float64), accumulate=True)

    def bands(self) -> list[Band]:
        """All bands in which a position counts, each with its interval."""
        return [band for first, end in _bands(self.edges[-1]) if (band := self._band(first, end))]

    def curve(self) -> list[tuple[float, float]]:
        """The middle of each bin, as tokens read, and the mean KL there."""
        sums_B, counts_B = self.sums_NB.sum(0).tolist(), self.counts_NB.sum(0).tolist()
        bins = zip(pairwise(self.edges), sums_B, counts_B, strict=True)
        return [((first + end + 1) / 2, total / count) for (first, end), total, count in bins if count]

    def _band(self, first: int, end: int) -> Band | None:
        inside = [number for number, edge in enumerate(self.edges[:-1]) if first <= edge < end]
        sums_N, counts_N = self.sums_NB[:, inside].sum(1), self.counts_NB[:, inside].sum(1)
        if not (count := int(counts_N.sum())):
            return None
        low, high = interval(sums_N[:, None], counts_N)[:, 0].tolist()
        return Band(first, end, float(sums_N.sum()) / count, low, high, count)


def _edges(length: int) -> Iterator[int]:
    """0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …, until `length` is reached."""
    edge = 0
    while edge < length:
        yield edge
        edge += max(1, (1 << edge.bit_length()) // (2 * STEPS))
    yield edge


def _bands(length: int) -> Iterator[tuple[int, int]]:
    """(0, 64), (64, 128), (128, 256), …, until `length` is reached."""
    first, end = 0, FIRST
    while first < length:
        yield first, end
        first, end = end, 2 * end
