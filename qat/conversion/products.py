"""Sums of `x xᵀ` over many vectors, as exact as fp32 allows.

A product of two bf16 numbers is exact in fp32, so where a GPU multiplies bf16 and adds up in fp32 nothing is
lost by it, at ten times the speed of fp32 products: only TF32 and its like round what they multiply. Vectors
with weights are split for it: an fp32 number is the sum of three bf16 numbers.

Tensor cores cut off what does not fit where others round (Fasi et al. 2021, "Numerical behavior of NVIDIA
tensor cores"). Over 4096 vectors at a time, added to the total by ordinary additions, that makes at most some
1e-5 of the sum, all in one direction.
"""

import torch
from torch import Tensor

from qat.machine import WIDENING

BLOCK = 512  # rows of a sum that are computed together, starting at the diagonal


def add_square(total_NN: Tensor, x_TN: Tensor, weight_T: Tensor | None = None) -> None:
    """Adds `Σ weight · x xᵀ` over T vectors to an fp32 total; only the upper triangle of the total is valid.

    Args:
        total_NN: fp32.
        x_TN: any float type.
        weight_T: fp32; None is 1 for all.
    """
    if x_TN.is_cuda and x_TN.dtype == torch.bfloat16 and WIDENING:
        weighted = [x_TN] if weight_T is None else split(x_TN * weight_T[:, None])
        for left in weighted:
            total_NN += torch.mm(left.mT, x_TN, out_dtype=torch.float32)
        return
    x_TN = x_TN.float()
    left = x_TN if weight_T is None else x_TN * weight_T[:, None]
    for begin in range(0, len(total_NN), BLOCK):
        total_NN[begin : begin + BLOCK, begin:].addmm_(left[:, begin : begin + BLOCK].mT, x_TN[:, begin:])


def mirrored(total_NN: Tensor) -> Tensor:
    """The full sum from its upper triangle, in place."""
    return total_NN.triu_().add_(total_NN.triu(1).mT)


def split(x: Tensor) -> list[Tensor]:
    """Three bf16 tensors whose sum is the fp32 tensor x, exactly but for what is below 1e-38."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts
