"""Intervals of means over rows.

Shapes: N rows, F figures.
"""

import torch
from torch import Tensor

RESAMPLES = 1000
CONFIDENCE = 0.95
METHOD = f"{CONFIDENCE:.0%}, percentile bootstrap over sequences, {RESAMPLES} resamples"


def interval(sums_NF: Tensor, counts_N: Tensor) -> Tensor:
    """Lowest and highest mean [2, F] that resampled rows make plausible.

    The percentile bootstrap (Efron and Tibshirani 1993, chapter 13), rows being drawn whole because positions of
    one row depend on each other. The draws are always the same, so that models which are measured on the same rows
    are moved by the same chance.

    Args:
        sums_NF: float64 sums over a row's positions.
        counts_N: positions of each row that count; rows without any are left out.
    """
    draw = torch.Generator().manual_seed(0)
    told = counts_N > 0
    rows = int(told.sum())
    drawn = torch.stack(
        [torch.randint(rows, (rows,), generator=draw).bincount(minlength=rows) for _ in range(RESAMPLES)]
    ).double()
    means = (drawn @ sums_NF[told]) / (drawn @ counts_N[told].double())[:, None]
    places = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float32)
    return means.quantile(places.double(), dim=0)
