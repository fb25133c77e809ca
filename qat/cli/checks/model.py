"""Checks the model and its teacher as far as possible without loading them."""

from pathlib import Path

from qat import model_files
from qat.config import Config, ModelConfig, ModelSource, Stage
from qat.config.keys import Bound
from qat.errors import ConfigError

TINY = Bound(low=261, high=2**20)  # vocabulary size of the tiny model: at least 256 bytes and five markers


def check(config: Config) -> None:
    """Checks that a model on disk, or its teacher, is named, exists, and has the files of a model.

    Raises:
        ConfigError: one is not.
    """
    for key, model in (("model", config.model), ("teacher", config.teacher)):
        if model is not None:
            _check(key, model, config.stage)


def _check(key: str, model: ModelConfig, stage: Stage) -> None:
    if model.source is ModelSource.tiny and not TINY.holds(model.vocab_size or TINY.low):
        raise ConfigError(f"{key}.vocab_size={model.vocab_size}: must be {TINY} for {key}={model.name}")
    if model.source is not ModelSource.folder:
        return
    if not model.path:
        raise ConfigError(f"{key}={model.name} needs a Hugging Face folder: {key}.path=<folder>")
    if stage is not Stage.doctor:  # stage=doctor reports on the folder itself
        model_files.check(Path(model.path).expanduser())


def vocabulary(model: ModelConfig) -> int | None:
    """The number of tokens: as configured, else as the folder's config.json says."""
    if model.vocab_size is not None or model.source is not ModelSource.folder:
        return model.vocab_size
    described = model_files.settings(Path(str(model.path)).expanduser())
    sizes = [part.get("vocab_size") for part in (described, described.get("text_config")) if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)
