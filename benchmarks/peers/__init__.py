"""Other people's quantizers, each behind one function: a model folder goes in, dequantized weights come out.

A method's package is imported by its own module when it is asked for, and nowhere else; without it the
module raises `UnavailableError` with what is missing. What comes out is checked by `grid.prove`.
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
        version = {}
        try:
            if self.package:
                version = {self.package: importlib.metadata.version(self.package)}
            module = importlib.import_module(f"peers.{self.module}")
        except (ImportError, OSError) as error:
            raise UnavailableError(f"{self.label} cannot run here ({error}): pip install {self.package}") from None
        return module.quantize, {**module.SETTINGS, **version}


PEERS = {
    "rtn": Peer("RTN", "rtn", None, False, None),
    "hqq": Peer("HQQ", "hqq", 16, False, "hqq"),
    "gptq": Peer("GPTQ", "gptq", None, True, "gptqmodel"),
    "autoround": Peer("AutoRound", "autoround", None, True, "auto-round"),
}
