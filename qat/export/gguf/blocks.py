"""Indices and scales as the bytes of llama.cpp's blocks; layouts as the decoders of `tables.py` read them.

Shapes: O outputs, B blocks of all rows, S weights of a block, C codes of a block.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.gguf.types import block, type_of
from qat.quant.formats import Format, Parts

Bytes = np.ndarray[Any, np.dtype[np.integer[Any]]]  # an array of uint8
SUPER = 256  # weights in a block of a k-quant


def packed(format: Format, index_OI: Tensor, parts: Parts) -> Bytes:
    """The rows of a layer [O, bytes] in the type that holds its format.

    Args:
        format: one that has such a type.
        index_OI: uint8.
        parts: as files have them, of as many rows.
    """
    kind = str(type_of(format.settings()))
    if kind.endswith("_K"):
        q, codes = index_OI.numpy().reshape(-1, SUPER), _codes(format, parts)
        made = _k_quant(kind, q, codes, *(_half(x) for name, x in parts.items() if name.startswith("super_")))
    else:
        size = block(kind)
        blocks = index_OI.shape[1] // size  # blocks in a row
        scales = [_half(parts[name].repeat_interleave(blocks // parts[name].shape[1], dim=1)) for name in parts]
        made = _plain(kind, index_OI.numpy().reshape(-1, size), scales)
    return np.concatenate(made, axis=1).reshape(len(index_OI), -1)


def _plain(kind: str, q: Bytes, scales: list[Bytes]) -> list[Bytes]:
    """A block after the other: its scales, then what its indices are."""
    if kind == "Q2_0":  # -1 to 2 for our -2 to 1: the other way round, with the sign bit of the scale turned
        return [scales[0] ^ np.array([0, 128], dtype=np.uint8), _planes(3 - q, 2, 1)]
    if kind == "Q8_0":
        return [*scales, q ^ 128]  # from an offset of 128 to two's complement
    high = [_planes(q >> 4, 1, 1)] if kind.startswith("Q5") else []
    return [*scales, *high, _planes(q & 15, 4, q.shape[1] // 2)]


def _k_quant(kind: str, q: Bytes, codes: list[Bytes], *scales: Bytes) -> list[Bytes]:
    if kind == "Q2_K":
        return [codes[0] | codes[1] << 4, _planes(q, 2, 32), *scales]
    if kind == "Q3_K":
        (code,) = codes
        six_bits = [_planes(code & 15, 4, 8), _planes(code >> 4, 2, 4)]
        return [_planes(q >> 2, 1, 32), _planes(q & 3, 2, 32), *six_bits, *scales]
    if kind == "Q6_K":
        return [_planes(q & 15, 4, 64), _planes(q >> 4, 2, 32), codes[0] ^ 128, *scales]
    high = [_planes(q >> 4, 1, 32)] if kind == "Q5_K" else []
    return [*scales, *_six_bits(*codes), *high, _planes(q & 15, 4, 32)]


def _planes(x: Bytes, bits: int, stride: int) -> Bytes:
    """Numbers [B, S] of a few bits as bytes, in each of which lie those `stride` apart, the first lowest."""
    apart = x.reshape(len(x), -1, 8 // bits, stride)
    shift = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(apart << shift, axis=2).reshape(len(x), -1)


def _six_bits(scale: Bytes, shift: Bytes) -> list[Bytes]:
    """Eight codes each of scales and shifts [B, 8]: two bits of the later four lie above the earlier four."""
    together = [code[:, :4] | code[:, 4:] >> 4 << 6 for code in (scale, shift)]
    return [*together, scale[:, 4:] & 15 | shift[:, 4:] << 4]


def _codes(format: Format, parts: Parts) -> list[Bytes]:
    """Codes [B, C] of each kind, counted from the lowest."""
    described = format.parts(0, 0)
    found = []
    for name, value in parts.items():
        if (part := described[name]).bits < 16:
            whole = (value - part.lowest).to(torch.uint8).numpy()
            found.append(whole.reshape(-1, whole.shape[1] * SUPER // _inputs(parts)))
    return found


def _inputs(parts: Parts) -> int:
    return parts["super_scale"].shape[1] * SUPER


def _half(scale: Tensor) -> Bytes:
    """Numbers [O, blocks] of fp16 as bytes [B, 2]."""
    return np.ascontiguousarray(scale.numpy().astype("<f2")).view(np.uint8).reshape(-1, 2)
