"""What a run has to do with other places: stores of archives, and experiment tracking."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key


class StoreKind(Enum):
    """Where named archives are kept."""

    local = "outputs/ alone"
    gdrive = "a mounted Google Drive"
    gcs = "a Google Cloud Storage bucket"
    hf = "a Hugging Face hub repository"
    url = "any URL that fsspec opens, s3:// and file:// among them"


class TrackerKind(Enum):
    """Who is told about a run besides its own files."""

    wandb = "Weights & Biases, offline without a login"
    none = "nobody"


@dataclass
class StoreConfig:
    """Where named archives are pulled from and pushed to."""

    name: str = MISSING
    kind: StoreKind = MISSING
    path: str | None = key(None, "folder, bucket or repository; null finds a mounted Drive")
    archive: str | None = key(
        None, "stage=pull and push: the name or path there; null takes those of checkpoint and cache"
    )
    mirror: bool = key(False, "keeps a copy of the run in the store while it goes on")


@dataclass
class TrackerConfig:
    """Experiment tracking beside the run's own files."""

    name: str = MISSING
    kind: TrackerKind = MISSING
    project: str = key("qat-speedrun", "of Weights & Biases")
