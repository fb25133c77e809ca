"""A Triton kernel for `qat.cache.topk`: log-sum-exp and block maxima of a position's logits in one pass.

Shapes: X positions, V vocabulary, N blocks of `BLOCK` neighbours in the vocabulary, the last one possibly short.
"""

# Triton gives the arguments of kernels its own meaning.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    AVAILABLE = False
else:
    AVAILABLE = True

BLOCK = 64
BLOCKS = 64  # vocabulary blocks that a Triton program holds at one time


def summary(logits_XV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [X] and the largest value of each block [X, N], both fp32."""
    positions, vocabulary = logits_XV.shape
    log_sum = torch.empty(positions, dtype=torch.float32, device=logits_XV.device)
    maxima = torch.empty(positions, triton.cdiv(vocabulary, BLOCK), dtype=torch.float32, device=logits_XV.device)
    _summary[(positions,)](logits_XV.contiguous(), log_sum, maxima, vocabulary, maxima.shape[1], BLOCK, BLOCKS)
    return log_sum, maxima


if AVAILABLE:

    @triton.jit
    def _summary(logits, log_sum, maxima, vocabulary, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
        position = tl.program_id(0).to(tl.int64)
        highest = tl.full([BLOCKS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCKS], tl.float32)
        for start in range(0, blocks, BLOCKS):
            n = start + tl.arange(0, BLOCKS)
            v = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = tl.load(logits + position * vocabulary + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
            largest = tl.max(x, 1)
            tl.store(maxima + position * blocks + n, largest, mask=n < blocks)
            higher = tl.maximum(highest, largest)
            seen = higher > float("-inf")  # false for lanes that have only read padding
            added = tl.sum(tl.exp(x - tl.where(seen, higher, 0.0)[:, None]), 1)
            total = tl.where(seen, total * tl.exp(highest - higher), 0.0) + added
            highest = higher
        top = tl.max(highest, 0)
        tl.store(log_sum + position, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))
