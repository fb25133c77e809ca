"""Documents to rows of equal length: nothing lost, nothing predicted across a boundary, padding never counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.config import Packing
from qat.data.documents import Document
from qat.data.packing import pack

documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=12)
PAD = 7


def packed(token_lists, length, packing):
    return pack((Document("", tokens) for tokens in token_lists), length, packing, PAD)


@given(documents, st.integers(2, 17))
def test_joined_rows_are_the_documents_less_the_tail(token_lists, length):
    stream = [token for tokens in token_lists for token in tokens]
    rows = packed(token_lists, length, Packing.joined)
    assert rows.input_ids.shape == (len(stream) // length, length)
    assert rows.input_ids.flatten().tolist() == stream[: len(stream) // length * length]


@given(documents, st.integers(2, 17))
def test_joined_rows_know_where_documents_begin_and_count_all_but_the_tokens_before(token_lists, length):
    owner = [number for number, tokens in enumerate(token_lists) for _ in tokens]
    rows = packed(token_lists, length, Packing.joined)
    for row in range(len(rows)):
        mine = owner[row * length : (row + 1) * length]
        begins = [place == 0 or mine[place] != mine[place - 1] for place in range(length)]
        assert rows.document_starts[row].bool().tolist() == begins
        assert rows.loss_mask[row].bool().tolist() == [mine[p] == mine[p + 1] for p in range(length - 1)]


@given(documents, st.integers(2, 17))
def test_rows_of_their_own_hold_every_document_and_padding_that_never_counts(token_lists, length):
    rows = packed(token_lists, length, Packing.rows)
    pieces = [tokens[i : i + length] for tokens in token_lists for i in range(0, len(tokens), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    assert len(rows) == len(pieces)
    for row, piece in enumerate(pieces):
        assert rows.input_ids[row].tolist() == piece + [PAD] * (length - len(piece))
        assert rows.loss_mask[row].tolist() == [int(p + 1 < len(piece)) for p in range(length - 1)]
    assert rows.document_starts.sum() == len(rows) and rows.document_starts[:, 0].all()


@pytest.mark.parametrize("packing", Packing)
def test_types_are_small(packing):
    rows = packed([[1, 2, 3, 4]], 2, packing)
    assert (rows.input_ids.dtype, rows.document_starts.dtype, rows.loss_mask.dtype) == (
        torch.int32,
        torch.uint8,
        torch.uint8,
    )


@pytest.mark.parametrize("token_lists", [[], [[]], [[1, 2, 3]]])
def test_too_little_text_is_no_row(token_lists):
    assert packed(token_lists, 4, Packing.joined).input_ids.shape == (0, 4)


@pytest.mark.parametrize("count", [None, 0, 2, 100])
def test_first_rows(count):
    rows = packed([[1, 2, 3, 4, 5, 6, 7, 8]], 2, Packing.joined)
    assert len(rows.first(count)) == len(rows.first(count).loss_mask) == min(4, 4 if count is None else count)
