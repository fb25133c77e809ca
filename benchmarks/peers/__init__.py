"""Other people's quantizers.

`rtn`, `hqq`, `gptq` and `autoround` are methods on a grid, each behind one function: a model folder goes in,
dequantized weights come out, and `grid.prove` checks them. `llamacpp` and `mlx` are engines with formats of their
own: they write the files that people use, embedding and all, and decode them again (`stored.py`).

A package is imported by its own module when it is asked for, and nowhere else.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peers.grid import Grid
from qat.errors import UnavailableError
from qat.models import ModelFolder

Quantize = Callable[[ModelFolder, dict[str, Grid], Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Peer:
    """One method.

    Attributes:
        label: what tables and pictures call it.
        module: in this folder; its `quantize(folder, grids, calibration_NL)` gives each layer's weight
            [O, I] fp32 by name, and its `SETTINGS` says what a reader has to know of how it was used.
        zero: bits that a group's zero point takes in the method's own format; None is as many as an index.
        calibrates: it looks at text.
        package: what to install; None is nothing.
    """

    label: str
    module: str
    zero: int | None
    calibrates: bool
    package: str | None

    def grid(self, bits: int, group: int) -> Grid:
        """What a layer is quantized to."""
        return Grid(bits, group, bits if self.zero is None else self.zero)

    def load(self) -> tuple[Quantize, dict[str, Any]]:
        """The function and its settings, with the version of the package.

        Raises:
            UnavailableError: the package is not installed, or does not import here.
        """
        module, settings = imported(self.label, self.module, self.package)
        return module.quantize, settings


def imported(label: str, name: str, package: str | None) -> tuple[Any, dict[str, Any]]:
    """A module of this folder, and its settings with the version of the package that it stands on.

    Raises:
        UnavailableError: the package is not installed, or does not import here.
    """
    version = {}
    try:
        if package:
            version = {package: importlib.metadata.version(package)}
        module = importlib.import_module(f"peers.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(f"{label} cannot run here ({error}): pip install {package}") from None
    return module, {**module.SETTINGS, **version}


PEERS = {
    "rtn": Peer("RTN", "rtn", None, False, None),
    "hqq": Peer("HQQ", "hqq", 16, False, "hqq"),
    "gptq": Peer("GPTQ", "gptq", None, True, "gptqmodel"),
    "autoround": Peer("AutoRound", "autoround", None, True, "auto-round"),
}
