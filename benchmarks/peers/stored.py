"""What a peer's files hold: a whole model, and the bytes of each of its parameters."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A model as its files have it.

    Attributes:
        model: decoded, in fp32 on the CPU.
        parameter_bytes: in the files by the parameter's name, scales and the like included.
        file_bytes: of all files that hold weights, with whatever else is in them.
    """

    model: PreTrainedModel
    parameter_bytes: dict[str, int]
    file_bytes: int

    def bits(self, names: Iterable[str]) -> float:
        """Mean bits per weight over some parameters."""
        names = list(names)
        weights = sum(self.model.get_parameter(name).numel() for name in names)
        return 8 * sum(self.parameter_bytes[name] for name in names) / weights
