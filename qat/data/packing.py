"""Documents to sequences: joined end to end and cut into rows of equal length."""

import torch

from qat.data.documents import Document


def pack(documents: list[Document], length: int) -> torch.Tensor:
    """Token ids [N, length] int32; the tail that fills no row is dropped.

    Teacher and student see the same row, so what an earlier document leaves in the context does not
    make the targets wrong.
    """
    stream = torch.tensor([token for document in documents for token in document.tokens], dtype=torch.int32)
    rows = len(stream) // length
    return stream[: rows * length].reshape(rows, length)
