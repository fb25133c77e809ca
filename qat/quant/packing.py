"""Indices of 1 to 8 bits as a dense bit stream: what a checkpoint stores.

Eight indices fill as many bytes as they have bits. Those bytes, the first the most significant, are one
number of at most 64 bits, in which an index is a shift away.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TOGETHER = 8


def pack(index: Tensor, bits: int) -> Tensor:
    """uint8 indices of any shape below 2**bits, as ceil(n · bits / 8) bytes, most significant bit first."""
    eights = pad(index.flatten(), (0, -index.numel() % TOGETHER)).view(-1, TOGETHER)
    words = _joined(eights, bits)
    packed = _cut(words, bits, 8).flatten()[: math.ceil(index.numel() * bits / 8)]
    return packed.cpu().contiguous()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 indices of the given shape, on the same device."""
    words = _joined(pad(packed, (0, -packed.numel() % bits)).view(-1, bits), 8)
    return _cut(words, TOGETHER, bits).flatten()[: math.prod(shape)].view(shape)


def _joined(parts_NP: Tensor, bits: int) -> Tensor:
    """Words [N], int64, of P parts of so many bits each, the first the most significant."""
    words = torch.zeros(len(parts_NP), dtype=torch.int64, device=parts_NP.device)
    for part in parts_NP.unbind(1):
        words.bitwise_left_shift_(bits).bitwise_or_(part)
    return words


def _cut(words_N: Tensor, parts: int, bits: int) -> Tensor:
    """The inverse: parts [N, P], uint8."""
    found = torch.empty(len(words_N), parts, dtype=torch.uint8, device=words_N.device)
    for number in range(parts):
        found[:, number] = (words_N >> bits * (parts - 1 - number)) & (2**bits - 1)
    return found
