"""Indices of 1 to 8 bits as a dense bit stream: what a checkpoint stores."""

import numpy as np
import torch
from torch import Tensor


def pack(index: Tensor, bits: int) -> Tensor:
    """uint8 indices of any shape below 2**bits, as ceil(n · bits / 8) bytes, most significant bit first."""
    planes = np.unpackbits(index.cpu().contiguous().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 indices of the given shape."""
    count = int(np.prod(shape))
    planes = np.zeros((count, 8), dtype=np.uint8)
    planes[:, 8 - bits :] = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1).reshape(shape))
