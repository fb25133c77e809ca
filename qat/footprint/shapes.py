"""What a plan of memory is made of: parts of memory, sizes of models, students to be made."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from qat import decoder
from qat.config import Config, DataConfig, ModeConfig, TrainConfig
from qat.generation.memory import elements, number, shape
from qat.machine import Machine
from qat.quant.architectures import NUMBER, Layer

FP32 = 4
MODEL, TEACHER = "model", "teacher"  # configuration keys to name for memory that only a smaller model reduces


@dataclass(frozen=True)
class Part:
    """What some memory is for, and the key that decides it.

    Attributes:
        host: a GPU does not hold it.
        least: it must be there whatever is done; else it is expected.
    """

    what: str
    bytes: float
    key: str
    host: bool = False
    least: bool = True


@dataclass(frozen=True)
class Job:
    """A quantized student to be made: its layers, and how they are to learn; `prefix` of its keys."""

    layers: list[Layer]
    mode: ModeConfig
    train: TrainConfig
    prefix: str = ""


def unknown(source: DataConfig) -> int:
    """Nobody has looked at the prompts of a source."""
    return 0


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model.

    Attributes:
        config: as transformers describes it.
        weights: how many there are.
        outside, layer: of them, those outside of decoder layers, and those of the largest decoder layer.
        streams: decoder layers can be read one at a time.
        vocabulary, hidden, inner, depth: tokens, dimensions of hidden states and inside MLPs, decoder layers.
        heads, shared, width: query heads, key-value heads, and dimensions of each.
        norms: queries and keys have norms of their own.
        remembered: numbers that are kept of a token while text is written.
        teacher: sizes of its teacher, where that is another model.
        longest_prompt: gives the tokens of the longest prompt of a source; 0 where nobody knows.
    """

    config: PreTrainedConfig
    weights: int
    outside: int
    layer: int
    streams: bool
    vocabulary: int
    hidden: int
    inner: int
    depth: int
    heads: int
    shared: int
    width: int
    norms: bool
    remembered: int
    teacher: "Shapes | None" = None
    longest_prompt: Callable[[DataConfig], int] = unknown

    @property
    def taught_by(self) -> tuple["Shapes", str]:
        """Sizes of its teacher, which may be itself, and the key that decides them."""
        return (self, MODEL) if self.teacher is None else (self.teacher, TEACHER)

    @property
    def joint(self) -> int:
        """Numbers of a token in queries, keys and values together."""
        return (self.heads + 2 * self.shared) * self.width

    @property
    def mixed(self) -> int:
        """Numbers of a token in the outputs of all heads."""
        return self.heads * self.width

    def fuses(self, machine: Machine) -> bool:
        """Whether rows go through fused layers (`qat.decoder`) when they are trained on."""
        kernels = machine.device.type == "cuda" and machine.dtype.itemsize == 2
        return kernels and machine.compile and decoder.described(self.config)

    @classmethod
    def of(cls, model: nn.Module, config: PreTrainedConfig, streams: bool = True) -> "Shapes":
        """Those of a model, which needs no memory behind it; what its configuration does not tell counts as none."""
        text: Any = config.get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        vocabulary, hidden, inner, depth = (number(text, name) for name in names)
        heads = number(text, "num_attention_heads")
        shared, width = shape(text) if heads else (0, 0)
        remembered = elements(text) if heads else 0
        inside: dict[str, int] = defaultdict(int)  # weights by decoder layer
        weights, norms = 0, False
        for name, parameter in model.named_parameters():
            weights, norms = weights + parameter.numel(), norms or "q_norm" in name
            if found := NUMBER.search(name):
                inside[name[: found.end()]] += parameter.numel()
        outside, layer = weights - sum(inside.values()), max(inside.values(), default=0)
        sizes = (vocabulary, hidden, inner, depth, heads, shared, width, norms, remembered)
        return cls(text, weights, outside, layer, streams, *sizes)


@dataclass(frozen=True)
class Place:
    """Memory of one kind, with what is free of it; `where` in a sentence.

    Attributes:
        beside: bytes of what is free that libraries are expected to take outside of any part.
    """

    free: float
    where: str
    parts: list[Part]
    beside: float = 0.0

    def needed(self, least: bool = False) -> float:
        """Bytes of all parts, or of those alone that must be there."""
        return sum(part.bytes for part in self.parts if part.least or not least)

    def room(self, least: bool = False) -> float:
        """Bytes that there are for all parts, or for those alone that must be there."""
        return self.free if least else max(0.0, self.free - self.beside)

    def fits(self, least: bool = False) -> bool:
        """Whether these have room."""
        return self.needed(least) <= self.room(least)


Jobs = Callable[[Config], list[Job]]  # gives the students that a configuration makes or trains


def kind(machine: Machine) -> str:
    """The kind of device by which sizes of pieces are chosen."""
    return "cuda" if machine.device.type == "cuda" else "cpu"
