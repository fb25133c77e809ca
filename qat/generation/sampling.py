"""Drawing tokens by the inverse of the cumulative distribution, in two steps.

The vocabulary is cut into blocks. One pass over the logits gives the mass of every block; cumulative sums
over these choose the block, and others inside it the token. `torch.multinomial` draws an exponential number
for every token instead, and one cumulative sum over all of them is several passes.

Shapes: R rows, V tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat.generation import kernels

BLOCK = 256  # tokens in a block of the vocabulary, in plain PyTorch


def choose(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> Tensor:
    """A token [R] for each row of fp32 logits.

    Args:
        logits_RV: fp32, contiguous.
        uniform_R: from [0, 1), where in the cumulative distribution to look; where it is negative, the most
            likely token is taken.
        temperature: divides the logits.
    """
    if kernels.AVAILABLE and logits_RV.is_cuda:
        return kernels.choose(logits_RV, uniform_R, temperature)
    greedy_R = uniform_R < 0
    if greedy_R.all():
        return logits_RV.argmax(1)
    drawn_R = _draw(logits_RV, uniform_R.clamp_min(0), temperature)
    return torch.where(greedy_R, logits_RV.argmax(1), drawn_R) if greedy_R.any() else drawn_R


def _draw(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> Tensor:
    mass_RV = (logits_RV - logits_RV.amax(1, keepdim=True)).div_(temperature).exp_()
    blocks_RNB = pad(mass_RV, (0, -mass_RV.shape[1] % BLOCK)).view(len(mass_RV), -1, BLOCK)
    cumulative_RN = blocks_RNB.sum(2).cumsum(1)
    target_R1 = uniform_R[:, None] * cumulative_RN[:, -1:]
    block_R1 = _first_above(cumulative_RN, target_R1)
    before_R1 = pad(cumulative_RN, (1, 0)).gather(1, block_R1)
    inside_RB = blocks_RNB[torch.arange(len(mass_RV), device=mass_RV.device), block_R1[:, 0]]
    token_R1 = _first_above(inside_RB.cumsum(1), target_R1 - before_R1)
    return (block_R1 * BLOCK + token_R1)[:, 0]


def _first_above(cumulative_RN: Tensor, target_R1: Tensor) -> Tensor:
    """The first place [R, 1] where a sum exceeds the target; where rounding leaves none, the last that adds to it."""
    last_R1 = torch.searchsorted(cumulative_RN, cumulative_RN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative_RN, target_R1, right=True), last_R1)
