"""Codebooks by the kmeans-pytorch package, with a seed, weights and a limit on iterations added.

Version 0.3 has no seed, no weights and no iteration limit; its tolerance is absolute, an empty cluster
makes it loop for ever, and it prints. Here it gets standardised values drawn evenly from the weighted
distribution (which is how weights reach it), a seed, a meter that stops it, and no terminal.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import NumericsError
from qat.quant.kmeans import check

SAMPLES = 2048  # weighted quantiles that represent a layer
MAX_ITERATIONS = 200
SEEDS = 20  # random starts that are tried before an error is raised


class _OutOfPatience(Exception):
    """Raised inside the package's loop to end it."""


class _Meter:
    """Replaces the package's progress bar, which the loop calls at each iteration."""

    def __init__(self, **_: object) -> None:
        self.iterations = 0

    def set_postfix(self, center_shift: str, **_: object) -> None:
        self.iterations += 1
        if center_shift == "nan" or self.iterations > MAX_ITERATIONS:
            raise _OutOfPatience

    def update(self) -> None:
        """Does nothing: no progress is shown."""


def kmeans_pytorch(x_NM: Tensor, weight_NM: Tensor, entries: int) -> Tensor:
    """As `kmeans.kmeans`, approximately: [N, K] float32, ascending.

    Raises:
        NumericsError: as `kmeans.kmeans`, or no start led to `entries` clusters.
    """
    check(x_NM, weight_NM)
    rows = [_cluster(_quantiles(x, weight), entries) for x, weight in zip(x_NM, weight_NM, strict=True)]
    return torch.stack(rows).to(x_NM.device)


def _quantiles(x_M: Tensor, weight_M: Tensor) -> Tensor:
    """Values at evenly spaced quantiles of the weighted distribution."""
    x, order = x_M.double().sort()
    mass = weight_M.double()[order].cumsum(0)
    places = (torch.arange(SAMPLES, dtype=torch.float32, device=x.device) + 0.5) / SAMPLES * mass[-1]
    return x[torch.searchsorted(mass, places).clamp_max(len(x) - 1)].cpu()


def _cluster(x_M: Tensor, entries: int) -> Tensor:
    distinct = x_M.unique()
    if len(distinct) <= entries:
        return torch.cat([distinct, distinct[-1:].expand(entries - len(distinct))]).float()
    mean, deviation = x_M.mean(), x_M.std()
    standard = ((x_M - mean) / deviation)[:, None].float()
    for seed in range(SEEDS):
        with contextlib.suppress(_OutOfPatience), _tamed(seed) as package:
            centres = package.kmeans(standard, entries)[1].flatten()
            return (centres.double() * deviation + mean).sort().values.float()
    raise NumericsError(f"kmeans-pytorch found no {entries} clusters in {SEEDS} starts: use kmeans=exact")


@contextlib.contextmanager
def _tamed(seed: int) -> Iterator[Any]:
    """The package with a seed, an iteration limit and no output; restores the global random state."""
    import kmeans_pytorch as package

    state, meter = np.random.get_state(), package.tqdm
    np.random.seed(seed)
    package.tqdm = _Meter
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield package
    finally:
        package.tqdm = meter
        np.random.set_state(state)
