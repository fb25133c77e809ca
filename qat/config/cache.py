"""What is kept of the teacher's outputs."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key


class Packing(Enum):
    """How documents become rows of equal length."""

    joined = "end to end, attention stopping where a document ends"
    rows = "each in rows of its own, the last one padded"


class Tail(Enum):
    """How the probability outside the top-k is known where an older cache does not say."""

    exact = "as recorded; a loss that needs more than an older cache holds is refused"
    estimate = "estimated from the random sample of an older cache"


@dataclass
class CacheConfig:
    """Teacher outputs: `sequences` rows of `length` tokens."""

    name: str = MISSING
    length: int = key(64, "tokens a sequence", low=2)
    top_k: int = key(64, "most likely tokens kept at a position", low=1)
    random: int = key(
        0, "uniformly drawn tokens kept at a position besides, for other tools: nothing here reads them", low=0
    )
    train_targets: bool = key(
        True, "false keeps text alone of training rows, for loss=full_kl: it has the teacher itself"
    )
    sequences: int | None = key(None, "at most so many training sequences; null keeps all", low=1)
    packing: Packing = key(Packing.joined, "documents end to end, or each in rows of its own")
    path: str | None = key(None, "an existing cache: its folder or archive, or the name of one that was pulled")
    tail: Tail = key(Tail.exact, "local: what an older cache does not know is refused or estimated")
    inspect: bool = key(False, "stage=cache: also show counts, examples and tail mass")
