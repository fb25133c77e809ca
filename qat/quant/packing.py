"""Indices of 1 to 8 bits, or 10 or 12, as a dense bit stream: in the order of checkpoints, and in that of engines.

Eight indices of at most 8 bits fill as many bytes as they have bits. Those bytes, the first the most significant, are
one number of at most 64 bits, in which an index is a shift away. An index of more bits goes as two halves.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat.quant.lookup import index_type

TOGETHER = 8
NARROW = 8  # bits of the widest index that a byte holds
PIECE = 1 << 18  # words made at one time: in int64 they take many times the memory of indices


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` indices take."""
    return -(-count * bits // 8)


def pack(index: Tensor, bits: int) -> Tensor:
    """Indices of any shape below 2**bits, as ceil(n · bits / 8) bytes, most significant bit first."""
    if bits > NARROW:
        return pack(_cut(index.flatten(), 2, bits // 2), bits // 2)
    eights = pad(index.flatten(), (0, -index.numel() % TOGETHER)).view(-1, TOGETHER)
    packed = torch.cat([_cut(_joined(some, bits), bits, 8).flatten() for some in eights.split(PIECE)])
    return packed[: packed_bytes(index.numel(), bits)].cpu().contiguous()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: indices of the given shape on the same device, uint8, or int16 of more than 8 bits."""
    if bits > NARROW:
        halves = unpack(packed, bits // 2, (math.prod(shape), 2))
        return _joined(halves, bits // 2).to(index_type(2**bits)).view(shape)
    parts = pad(packed, (0, -packed.numel() % bits)).view(-1, bits).split(PIECE)
    index = torch.cat([_cut(_joined(some, 8), TOGETHER, bits).flatten() for some in parts])
    return index[: math.prod(shape)].view(shape)


def words(index_OI: Tensor, bits: int) -> Tensor:
    """uint8 indices below 2**bits, row by row as int32 words [O, ceil(I · bits / 32)], least significant bit first.

    That is `pack` of eights from their last to their first, whose bytes are turned round as well.
    """
    outputs, inputs = index_OI.shape
    eights = pad(index_OI, (0, -inputs % 32)).view(outputs, -1, TOGETHER)
    bytes_OEP = pack(eights.flip(2), bits).view(outputs, -1, bits).flip(2).contiguous()
    return bytes_OEP.view(outputs, -1).view(torch.int32)[:, : -(-inputs * bits // 32)].contiguous()


def unpack_rows(packed: Tensor, bits: int, rows_X: Tensor, columns: int) -> Tensor:
    """Indices [X, columns] of some rows of a packed matrix, in the type of `unpack`; no other rows are unpacked.

    An index lies in at most two bytes, wherever its row begins.
    """
    first_XC = (rows_X[:, None] * columns + torch.arange(columns, device=packed.device)) * bits
    byte_XC, within_XC = first_XC // 8, first_XC % 8
    behind_XC = (byte_XC + 1).clamp_max_(len(packed) - 1)  # the last index may have no next byte
    both_XC = packed[byte_XC].int() << 8 | packed[behind_XC].int()
    return (both_XC >> (16 - bits - within_XC) & (2**bits - 1)).to(index_type(2**bits))


def _joined(parts_NP: Tensor, bits: int) -> Tensor:
    """Joins P parts of `bits` bits each into words [N], int64, the first part the most significant."""
    return (parts_NP.long() << _shifts(parts_NP.shape[1], bits, parts_NP)).sum(1)


def _cut(words_N: Tensor, parts: int, bits: int) -> Tensor:
    """Splits words into parts [N, P], uint8; the inverse of `_joined`."""
    return (words_N[:, None] >> _shifts(parts, bits, words_N) & (2**bits - 1)).to(torch.uint8)


def _shifts(parts: int, bits: int, like: Tensor) -> Tensor:
    """Number of bits below each part in its word."""
    return torch.arange(parts - 1, -1, -1, device=like.device) * bits
