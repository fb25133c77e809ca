import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quant import packing
from qat.quant.lookup import index_type
from qat.quant.packing import pack, unpack, unpack_rows

BITS = st.sampled_from([*range(1, 9), 10, 12])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BITS, st.lists(st.integers(1, 13), min_size=1, max_size=3), st.integers(0, 1000))
def test_indices_come_back_and_take_their_bits(bits, shape, seed):
    index = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(index_type(2**bits))
    packed = pack(index, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-index.numel() * bits // 8),)
    restored = unpack(packed, bits, tuple(shape))
    assert restored.dtype == index.dtype and torch.equal(restored, index)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(BITS, st.integers(1, 40), st.integers(0, 1000))
def test_the_stream_is_the_binary_digits_one_index_after_the_other(bits, count, seed):
    index = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(index_type(2**bits))
    digits = "".join(f"{i:0{bits}b}" for i in index.tolist())
    digits += "0" * (-len(digits) % 8)
    expected = [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]
    assert pack(index, bits).tolist() == expected


@pytest.mark.parametrize("count", [0, 5, 16, 61])
def test_pieces_of_a_stream_give_what_the_whole_gives(monkeypatch, count):
    index = torch.randint(8, (count,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = pack(index, 3)
    monkeypatch.setattr(packing, "PIECE", 2)
    assert torch.equal(pack(index, 3), whole) and torch.equal(unpack(whole, 3, (count,)), index)


def test_a_transposed_view_is_packed_in_its_own_order():
    index = torch.tensor([[0, 1, 2], [3, 2, 1]], dtype=torch.uint8).T
    assert torch.equal(unpack(pack(index, 2), 2, (3, 2)), index)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_all_ones_survive(bits):
    index = torch.full((3, 5), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(index, bits), bits, (3, 5)), index)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BITS, st.integers(1, 9), st.integers(1, 13), st.integers(0, 1000))
def test_rows_come_out_alone_wherever_they_begin(bits, rows, columns, seed):
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(2**bits, (rows, columns), generator=draw).to(index_type(2**bits))
    some = torch.randint(rows, (5,), generator=draw)
    assert torch.equal(unpack_rows(pack(index, bits), bits, some, columns), index[some])
