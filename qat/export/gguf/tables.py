"""Types of tensors in the tables of the package `gguf`, with one that llama.cpp has and the package does not yet.

Q2_0 is number 42 of ggml.h: blocks of 64 weights, an fp16 scale d and then codes q of 2 bits, four to a byte and the
first lowest; a weight is (q − 1) · d (`dequantize_row_q2_0` in llama.cpp's `ggml-quants.c`). Once entered, the
package's writer and reader take it like any other.
"""

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

Q2_0, Q2_0_FILE = 42, 41  # ggml.h's number of the type, llama.h's of a file with most weights in it
Array = np.ndarray[Any, Any]


def kind(name: str) -> GGMLQuantizationType:
    """The type of a name."""
    return GGMLQuantizationType[name]


def file_type(name: str) -> int:
    """What llama.cpp calls a file by, such as `MOSTLY_Q4_0`, as its number."""
    return Q2_0_FILE if name == "MOSTLY_Q2_0" else int(gguf.LlamaFileType[name])


def decoded(data: Array, kind: GGMLQuantizationType) -> Array:
    """Rows of bytes [..., bytes] as weights [..., I] of fp32."""
    if kind.name != "Q2_0":
        return gguf.dequantize(data, kind)
    blocks = np.ascontiguousarray(data).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    codes = blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    weights = blocks[:, :2].view("<f2").astype(np.float32) * (codes.reshape(len(blocks), -1).astype(np.float32) - 1)
    return weights.reshape(*data.shape[:-1], -1)


def _enter() -> None:
    """Adds Q2_0 to the package's enumeration and sizes, unless a newer package has it."""
    if "Q2_0" in GGMLQuantizationType.__members__:
        return
    member = int.__new__(GGMLQuantizationType, Q2_0)
    member._name_, member._value_ = "Q2_0", Q2_0
    GGMLQuantizationType._member_map_["Q2_0"] = member
    GGMLQuantizationType._value2member_map_[Q2_0] = member
    gguf.GGML_QUANT_SIZES[member] = (64, 18)  # weights of a block, and its bytes


_enter()
