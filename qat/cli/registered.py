"""Registered checkpoints and caches, which are known by name: there, or in a store that the run may ask."""

from pathlib import Path

from qat import names
from qat.config import Config, StoreKind
from qat.errors import MissingError


def check(config: Config) -> None:
    """Refuses a name for which nothing is found, before anything starts.

    Raises:
        MissingError: it is not in the outputs folder, and no store is named.
    """
    if config.store.kind is not StoreKind.local:
        return
    outputs, given = Path(config.outputs), config.checkpoint
    if names.uses_checkpoint(config):
        _check("checkpoint", given.path or given.name, names.start(config))
        for word in config.evaluate.against:
            _check("checkpoint", word, names.checkpoint(word, outputs))
    if names.uses_cache(config) and config.cache.path:
        _check("cache", config.cache.path, names.cached(config))


def _check(group: str, word: str, place: Path | None) -> None:
    if place is None or place.exists() or names.archive_file(word):
        return
    option = names.registered(word, group) or word
    raise MissingError(
        f"{group}={option} is not in {place.parent} yet: fetch it with stage=pull {group}={option} store=<gdrive,"
        " gcs, hf or url>, or name the store in this command"
    )
