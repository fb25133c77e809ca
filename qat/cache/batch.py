"""A batch of text rows, with the teacher's recorded outputs where there are any."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qat import rows
from qat.cache.format import decode_ids


@dataclass(frozen=True)
class Batch:
    """Some rows with what the teacher says of them, held as they are stored and decoded where they are used.

    Attributes:
        stored: the tensors of `format`, without the random sample.
        vocab_size: tokens of the teacher.
        joined: rows hold several documents.
    """

    stored: dict[str, Tensor]
    vocab_size: int
    joined: bool

    @cached_property
    def input_ids(self) -> Tensor:
        """Token ids [B, L] int64."""
        return self.stored["input_ids"].long()

    @cached_property
    def topk_ids(self) -> Tensor:
        """The teacher's most likely next tokens [B, L-1, K] int64."""
        return decode_ids(self.stored["topk_ids"], self.stored.get("topk_ids_high"), self.vocab_size)

    @cached_property
    def topk_logprobs(self) -> Tensor:
        """Their log-probabilities [B, L-1, K] fp32."""
        return self.stored["topk_logprobs"].float()

    @cached_property
    def loss_mask(self) -> Tensor:
        """True [B, L-1] where the position counts."""
        return self.stored["loss_mask"].bool()

    @cached_property
    def answers(self) -> Tensor:
        """True [B, L-1] where the position counts and the next token belongs to an answer."""
        return self.loss_mask & self.stored["answers"].bool()

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a model's forward pass, for `qat.forward`."""
        return rows.inputs(self.input_ids, self.stored["document_starts"] if self.joined else None)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; from pinned memory the copy runs beside what the GPU does."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.stored.items()}
        return Batch(moved, self.vocab_size, self.joined)

    def rows(self, numbers: Tensor) -> "Batch":
        """Some of its rows."""
        chosen = {name: tensor[numbers] for name, tensor in self.stored.items()}
        return Batch(chosen, self.vocab_size, self.joined)

    def cut(self, length: int) -> "Batch":
        """The same rows, each as several of `length` tokens, of which the cache says nothing but their text.

        Every piece begins a document, or goes on with one of which it sees nothing; the last token of each predicts
        nothing. What a teacher said of a whole row is left out, as it had seen the pieces before.
        """
        if (whole := self.stored["input_ids"].shape[1]) == length:
            return self
        pieces = len(self.stored["input_ids"]) * whole // length
        counts = torch.nn.functional.pad(self.stored["loss_mask"], (0, 1)).reshape(pieces, length)[:, :-1]
        found = {"input_ids": self.stored["input_ids"].reshape(pieces, length), "loss_mask": counts}
        if "document_starts" in self.stored:
            found["document_starts"] = self.stored["document_starts"].reshape(pieces, length).clone()
            found["document_starts"][:, 0] = 1
        for name in ("topk_ids", "topk_ids_high", "topk_logprobs"):
            if name in self.stored:
                found[name] = self.stored[name].new_empty(pieces, length - 1, 0)
        return Batch(found, self.vocab_size, self.joined)

    def split(self, rows: int | list[int]) -> list["Batch"]:
        """Micro-batches of at most `rows` sequences, or of so many each."""
        parts = zip(*(tensor.split(rows) for tensor in self.stored.values()), strict=True)
        return [Batch(dict(zip(self.stored, part, strict=True)), self.vocab_size, self.joined) for part in parts]


class Text:
    """Token ids [N, L] of which nothing is cached, read like a split: every row is a document of its own."""

    def __init__(self, ids_NL: Tensor) -> None:
        self._ids = ids_NL
        self.rows, self.meta = len(ids_NL), {"length": ids_NL.shape[1]}

    def batch(self, rows: Tensor) -> Batch:
        """The rows with these numbers [B]."""
        ids = self._ids[rows]
        return Batch({"input_ids": ids, "loss_mask": torch.ones(ids[:, 1:].shape, dtype=torch.uint8)}, 0, False)

    def in_order(self, size: int) -> list[Tensor]:
        """All row numbers as batches of at most `size`."""
        return list(torch.arange(self.rows).split(size))

    def batches(self, size: int) -> list[Batch]:
        """All rows, at most `size` at a time."""
        return [self.batch(rows) for rows in self.in_order(size)]
