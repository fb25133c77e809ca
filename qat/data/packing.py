"""Documents to rows of equal length, with the places where documents begin and the positions that count."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.config import Packing
from qat.data.documents import Document


@dataclass(frozen=True)
class Rows:
    """Sequences ready for a model.

    Attributes:
        input_ids: [N, L] int32.
        document_starts: [N, L] uint8, 1 where a document begins or goes on from the row before.
        loss_mask: [N, L-1] uint8, 1 where position p predicts a token of its own document.
        answers: [N, L-1] uint8, 1 where that token belongs to an answer; all 0 where documents do not tell.
    """

    input_ids: Tensor
    document_starts: Tensor
    loss_mask: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int | None) -> "Rows":
        """At most so many rows; None is all of them."""
        return Rows(*(tensor[:count] for tensor in self._tensors))

    def split(self, size: int) -> list["Rows"]:
        """Pieces of at most `size` rows."""
        return [Rows(*part) for part in zip(*(tensor.split(size) for tensor in self._tensors), strict=True)]

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.document_starts, self.loss_mask, self.answers


def pack(documents: Iterable[Document], length: int, packing: Packing, pad: int) -> Rows:
    """The rows of some documents.

    Args:
        documents: read once, in order.
        length: tokens of a row.
        packing: `joined` cuts the stream of all documents, and drops the tail that fills no row;
            `rows` gives every document rows of its own, the last one filled with `pad`.
        pad: what fills rows; it never counts.
    """
    return _joined(documents, length) if packing is Packing.joined else _apart(documents, length, pad)


def _joined(documents: Iterable[Document], length: int) -> Rows:
    stream, starts, said = array("i"), array("q"), bytearray()
    for document in documents:
        if document.tokens:
            starts.append(len(stream))
            stream.extend(document.tokens)
            said += _said(document)
    rows = len(stream) // length
    begins = torch.zeros(len(stream), dtype=torch.uint8)
    begins[torch.tensor(starts, dtype=torch.long)] = 1
    begins = begins[: rows * length].reshape(rows, length)
    begins[:, :1] = 1
    answers = _bytes(said)[: rows * length].reshape(rows, length)[:, 1:]
    return Rows(_tensor(stream)[: rows * length].reshape(rows, length), begins, 1 - begins[:, 1:], answers)


def _apart(documents: Iterable[Document], length: int, pad: int) -> Rows:
    stream, lengths, said = array("i"), array("q"), bytearray()
    for piece, answers in _pieces(documents, length):
        stream.extend(piece)
        stream.extend([pad] * (length - len(piece)))
        said += answers.ljust(length, b"\0")
        lengths.append(len(piece))
    ids = _tensor(stream).reshape(-1, length)
    begins = torch.zeros(ids.shape, dtype=torch.uint8)
    begins[:, :1] = 1
    counts = torch.arange(1, length) < torch.tensor(lengths, dtype=torch.long)[:, None]
    return Rows(ids, begins, counts.to(torch.uint8), _bytes(said).reshape(-1, length)[:, 1:])


def _pieces(documents: Iterable[Document], length: int) -> Iterator[tuple[list[int], bytes]]:
    """Documents in pieces that fit a row, with what in them are answers; a single token has nothing to predict."""
    for document in documents:
        said = _said(document)
        for start in range(0, len(document.tokens), length):
            piece = document.tokens[start : start + length]
            if len(piece) > 1:
                yield piece, said[start : start + length]


def _said(document: Document) -> bytes:
    """A byte for each token, 1 where it belongs to an answer."""
    said = bytearray(len(document.tokens))
    for begin, end in document.answers:
        said[begin:end] = b"\1" * (end - begin)
    return bytes(said)


def _bytes(values: bytearray) -> Tensor:
    return torch.frombuffer(values, dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)


def _tensor(values: array) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int32) if values else torch.empty(0, dtype=torch.int32)
