"""Documents to sequences of equal length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.data.documents import Document
from qat.data.packing import pack

documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=12)


@given(documents, st.integers(2, 17))
def test_rows_are_the_joined_documents_less_the_tail(token_lists, length):
    stream = [token for tokens in token_lists for token in tokens]
    rows = pack([Document("", tokens) for tokens in token_lists], length)
    assert rows.shape == (len(stream) // length, length)
    assert rows.flatten().tolist() == stream[: len(stream) // length * length]
    assert len(stream) - rows.numel() < length


def test_rows_are_32_bit_integers():
    assert pack([Document("", [1, 2, 3, 4])], 2).dtype is torch.int32


@pytest.mark.parametrize("token_lists", [[], [[]], [[1, 2, 3]]])
def test_too_little_text_is_no_row(token_lists):
    assert pack([Document("", tokens) for tokens in token_lists], 4).shape == (0, 4)
