"""Groups of columns of a row that share a scale and perhaps a shift: first guess and least-squares fit of both.

Formats whose scales are numbers of groups (`grid`, `kquant`) differ in what values there are and in how scales are
stored; what is here they have in common.

Shapes: N layers, O outputs, I inputs, K values, G groups of a row, P numbers of a group (scale, shift).
"""

import torch
from torch import Tensor

from qat.quant import least_squares
from qat.quant.least_squares import Linear
from qat.quant.lookup import nonzero, snapped

TRIED = 10  # number of candidate widths of a group's values
# The smallest width tried, relative to the widest, is 1 − NARROW^bits: with fewer values, more weights lie outside.
NARROW = 0.76
GUESSED = 1 << 18  # weights that a CPU tries widths for at a time: what it computes of them stays in its caches


def each(of_group: Tensor, size: int) -> Tensor:
    """[N, O, G] to [N, O, I]: each column gets the number of its group."""
    return of_group.repeat_interleave(size, dim=-1)


def sums(x_NOI: Tensor, size: int) -> Tensor:
    """[N, O, I] to [N, O, G]: the sums over groups."""
    return x_NOI.unflatten(-1, (-1, size)).sum(-1)


def guess(weight_NOI: Tensor, h_NI: Tensor, values_K: Tensor, size: int, shifted: bool) -> list[Tensor]:
    """Scales and, where there are any, shifts [N, O, G]: the best of a few, each by least squares for its values.

    Tried are the nearest values under scales with which they reach a group's outermost weight, and smaller ones down
    to where only its middle is covered; scales below zero too where values do not lie evenly around it.

    Args:
        weight_NOI: fp32.
        h_NI: importance of columns.
        values_K: ascending.
        size: columns of a group.
        shifted: whether groups have shifts.
    """
    rows = max(1, GUESSED // h_NI.numel()) if weight_NOI.device.type == "cpu" else weight_NOI.shape[1]
    found = [_guess(part, h_NI, values_K, size, shifted) for part in weight_NOI.split(rows, 1)]
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def _guess(weight_NOI: Tensor, h_NI: Tensor, values_K: Tensor, size: int, shifted: bool) -> list[Tensor]:
    """As `guess`, all rows at once."""
    groups = weight_NOI.unflatten(2, (-1, size))
    importance = h_NI.view(len(h_NI), 1, -1, size)
    low, high = groups.amin(3), groups.amax(3)
    center = (high + low) / 2 if shifted else torch.zeros_like(low)
    middle = (values_K[0] + values_K[-1]) / 2 if shifted else torch.zeros_like(values_K[0])
    widest = torch.maximum(high - center, center - low) / (values_K - middle).abs().max()
    signs = (1.0,) if shifted or torch.equal(values_K, -values_K.flip(0)) else (1.0, -1.0)
    most, best = torch.full_like(widest, -1), [widest, center]
    narrowest = 1 - NARROW ** (len(values_K).bit_length() - 1)
    for share in torch.linspace(narrowest, 1, TRIED, dtype=torch.float32).tolist():
        for sign in signs:
            scale = sign * share * widest
            relative = (groups - (center - middle * scale)[..., None]) / nonzero(scale)[..., None]
            explained, *found = _regression(snapped(relative, values_K), groups, importance, shifted)
            better = explained > most
            most = torch.where(better, explained, most)
            best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    return best if shifted else best[:1]


def _regression(x: Tensor, y: Tensor, h: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weighted line of y over x: explained squares, slope and intercept, along the last dimension."""
    if not shifted:
        square, product = (h * x.square()).sum(-1), (h * x * y).sum(-1)
        slope = product / square.clamp_min(1e-30)
        return slope * product, slope, torch.zeros_like(slope)
    mean_x, mean_y = ((h * one).sum(-1, keepdim=True) / h.sum(-1, keepdim=True) for one in (x, y))
    explained, slope, _ = _regression(x - mean_x, y - mean_y, h, False)
    return explained, slope, mean_y[..., 0] - slope * mean_x[..., 0]


def linear(value_NOI: Tensor, h_NI: Tensor, size: int, shifted: bool) -> Linear:
    """The quantized weight as a function of scales and shifts [N, O, G, P], each weight staying with its value."""
    return combined([value_NOI, torch.ones_like(value_NOI)] if shifted else [value_NOI], h_NI, size)


def combined(of: list[Tensor], h_NI: Tensor, size: int) -> Linear:
    """Sums of known matrices [N, O, I], each times factors of its groups, as a function of the factors [N, O, G, P]."""
    importance = h_NI[:, None].expand_as(of[0])
    gram = [torch.stack([sums(a * b * importance, size) for b in of], 3) for a in of]
    return Linear(
        lambda x: torch.stack([each(x[..., p], size) * of[p] for p in range(len(of))]).sum(0),
        lambda E: torch.stack([sums(E * one, size) for one in of], 3),
        least_squares.solver(torch.stack(gram, 3)),
        (2, 3),
    )
