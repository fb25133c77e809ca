"""A few rows on which a model is looked at, and the documents in them, together and each alone.

Shapes: B rows, L tokens of a row, X positions looked at.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from qat.rows import inputs

LOOKED_AT = 256  # rows looked at to choose the two that are compared
POSITIONS = 64  # maximum positions compared in all documents together; of more, evenly spaced ones


class Batch(Protocol):
    """Some rows, with what is recorded of them; see `qat.cache.batch`."""

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are recorded."""

    @property
    def joined(self) -> bool:
        """True where rows hold several documents."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids [B, L] int64."""

    @property
    def loss_mask(self) -> Tensor:
        """True [B, L-1] where the position counts."""

    @property
    def topk_ids(self) -> Tensor:
        """Most likely next tokens [B, L-1, K] int64."""

    @property
    def topk_logprobs(self) -> Tensor:
        """Their log-probabilities [B, L-1, K] fp32."""

    def rows(self, numbers: Tensor) -> "Batch":
        """Some of its rows."""


class Rows(Protocol):
    """Rows of tokens that are read in batches: a split of a cache, plain text, windows of a long one."""

    rows: int

    def batch(self, rows: Tensor) -> Batch:
        """The rows with these numbers."""


@dataclass(frozen=True)
class Sample:
    """Rows of token ids.

    Attributes:
        input_ids: [B, L] int64.
        ends: [B], behind the last token that is text.
        starts: [B, L], true where a document begins; None for one document a row.
        pad: token that would fill up documents in rows of their own.
        recorded: what a cache says of every position: token ids [B, L-1, K] and their log-probabilities.
    """

    input_ids: Tensor
    ends: Tensor
    starts: Tensor | None = None
    pad: int = 0
    recorded: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, input_ids: Tensor, loss_mask: Tensor, document_starts: Tensor | None, pad: int = 0) -> "Sample":
        """Two of many rows that show most: with one document and with few, or with the most and the least padding.

        Args:
            input_ids: [N, L].
            loss_mask: [N, L-1], true where a position counts.
            document_starts: [N, L] of joined documents; None for one document a row.
            pad: see the class.
        """
        rows = _telling(loss_mask, document_starts)
        starts = None if document_starts is None else document_starts[rows]
        return cls._made(input_ids[rows], loss_mask[rows], starts, pad)

    @classmethod
    def _made(cls, input_ids: Tensor, loss_mask: Tensor, starts: Tensor | None, pad: int = 0) -> "Sample":
        if starts is None:
            return cls(input_ids.long(), _ends(loss_mask), None, pad)
        ends = torch.full((len(input_ids),), input_ids.shape[1], dtype=torch.long)
        return cls(input_ids.long(), ends, starts.bool(), pad)

    @classmethod
    def of_rows(cls, rows: Rows) -> "Sample":
        """Two rows of a split, a text or windows, out of many that are spread over it, the last among them."""
        looked_at = rows.batch(_spread(rows.rows, min(1.0, LOOKED_AT / rows.rows)))
        starts = looked_at.stored["document_starts"] if looked_at.joined else None
        numbers = _telling(looked_at.loss_mask, starts)
        batch = looked_at.rows(numbers)
        sample = cls._made(batch.input_ids, batch.loss_mask, None if starts is None else starts[numbers])
        told = "topk_ids" in batch.stored and batch.stored["topk_ids"].shape[-1] > 0
        return replace(sample, recorded=(batch.topk_ids, batch.topk_logprobs) if told else None)

    @property
    def shape(self) -> tuple[int, bool]:
        """Tokens of a row, and whether documents share rows."""
        return self.input_ids.shape[1], self.starts is not None

    @cached_property
    def documents(self) -> list[tuple[int, int, int]]:
        """Row, first place and the place behind the last, of every document that predicts anything."""
        found = []
        for row, end in enumerate(self.ends.tolist()):
            first = [0] if self.starts is None else self.starts[row].nonzero()[:, 0].tolist()
            found += [(row, begin, behind) for begin, behind in pairwise([*first, end])]
        return [(row, first, end) for row, first, end in found if end - first > 1]

    @cached_property
    def places(self) -> list[Tensor]:
        """The places looked at in each document, all but its last one at most."""
        share = min(1.0, POSITIONS / max(1, sum(end - first - 1 for _, first, end in self.documents)))
        return [_spread(end - first - 1, share) for _, first, end in self.documents]

    def alone(self) -> list[Tensor]:
        """The token ids [1, T] of each document."""
        return [self.input_ids[row, first:end][None] for row, first, end in self.documents]

    def told(self) -> tuple[Tensor, Tensor]:
        """Token ids [X, K] and log-probabilities [X, K] that are recorded of the places."""
        nothing = torch.empty(0, dtype=torch.float32)
        ids, logprobs = self.recorded or (nothing, nothing)
        at = [(row, first + places) for (row, first, _), places in zip(self.documents, self.places, strict=True)]
        return torch.cat([ids[place] for place in at]), torch.cat([logprobs[place] for place in at])

    def together(self, joined: bool, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of a forward pass, and where among its positions the places [X] are.

        Args:
            joined: documents stay in the rows that they share; else each gets a row of its own, filled up.
            device: of the arguments.
        """
        ids, starts, length = self.input_ids, self.starts, self.input_ids.shape[1]
        origins = [(row, first) for row, first, _ in self.documents]
        if self.starts is not None and not joined:
            ids, starts = self._apart(), None
            origins = [(row, 0) for row in range(len(ids))]
        at = [row * (length - 1) + first + place for (row, first), place in zip(origins, self.places, strict=True)]
        given = inputs(ids.to(device), None if starts is None else starts.to(device))
        return given, torch.cat(at).to(device)

    def _apart(self) -> Tensor:
        rows = self.input_ids.new_full((len(self.documents), self.input_ids.shape[1]), self.pad)
        for number, document in enumerate(self.alone()):
            rows[number, : document.shape[1]] = document[0]
        return rows


def _ends(loss_mask: Tensor) -> Tensor:
    """The places [N] behind the last tokens that are text."""
    return (loss_mask.bool() * torch.arange(2, loss_mask.shape[1] + 2)).amax(1)


def _telling(loss_mask: Tensor, document_starts: Tensor | None) -> Tensor:
    """Numbers of the two rows that show most, in order.

    Of joined documents those are the row with the fewest, whose tokens see farthest, and the one whose first
    document and positions of others are both many: there it shows most if the others see the first.
    """
    if document_starts is None:
        shown = _ends(loss_mask)
        return torch.stack([shown.argmin(), shown.argmax()]).unique()
    later = document_starts.cumsum(1) > 1
    others = (later[:, :-1] & loss_mask.bool()).sum(1)
    return torch.stack([document_starts.sum(1).argmin(), torch.minimum(others, (~later).sum(1)).argmax()]).unique()


def _spread(count: int, share: float) -> Tensor:
    """A share of the numbers below `count`, the last among them."""
    chosen = max(1, round(count * share))
    if chosen >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, chosen, dtype=torch.float32).round().long()
