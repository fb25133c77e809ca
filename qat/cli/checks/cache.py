"""The cache: where it lies, and whether it holds what the loss asks for."""

from pathlib import Path

from qat import names
from qat.artifacts import MANIFEST
from qat.cli.checks.manifests import described
from qat.cli.checks.model import vocabulary
from qat.config import Config, Stage, StoreKind, Tail
from qat.errors import ConfigError
from qat.names import TRAINS


def check(config: Config) -> None:
    """Checks that a cache on disk is named and exists, and that top-k does not exceed the vocabulary."""
    _check_place(config)
    if config.stage in TRAINS:
        _check_loss(config)
    cache = config.cache
    if cache.inspect and config.stage is not Stage.cache:
        raise ConfigError("cache.inspect=true goes with stage=cache")
    known = vocabulary(config.model)
    for key, tokens in (("cache.top_k", cache.top_k), ("cache.random", cache.random)):
        if known is not None and tokens > known:
            raise ConfigError(f"{key}={tokens}: model={config.model.name} has only {known} tokens")


def _check_place(config: Config) -> None:
    cache = config.cache
    if cache.name == "local" and not cache.path:
        raise ConfigError("cache=local needs a cache folder: cache.path=<folder>")
    if cache.path and not (_cached(config) or names.archive_file(cache.path) or _in_a_store(config)):
        raise ConfigError(
            f"cache.path={cache.path}: no such folder or archive, and none of that name in {config.outputs}/caches"
        )


def _cached(config: Config) -> Path | None:
    """Where the named cache lies, if it is here already."""
    place = names.cached(config)
    return place if place and place.exists() else None


def _in_a_store(config: Config) -> bool:
    """Whether the named cache may be had from a store: from the one that is named, or it is a registered one."""
    return config.store.kind is not StoreKind.local or names.registered(str(config.cache.path), "cache") is not None


def _check_loss(config: Config) -> None:
    """Checks that the cache holds what the loss needs."""
    cache, loss = config.cache, config.loss
    if cache.path and loss.kind.needs_tail and _lacks_tail(config):
        raise ConfigError(
            f"loss={loss.name} needs the probability outside the top-k, which {cache.path} does not hold: use"
            " loss=topk_kl, which is exact, or cache.tail=estimate where it has a random sample"
        )
    if loss.kind.needs_answers:
        if cache.path and not _has_answers(config):
            raise ConfigError(
                f"loss={loss.name} learns from answers, and {cache.path} does not say which tokens belong to any: give"
                " conversations as data.path, or a cache that was recorded with this loss"
            )
        return
    full = not loss.kind.needs_targets  # such a loss gets full distributions from the teacher beside the student
    if (not full or loss.hard > 0) and not _has_targets(config):
        which = f"loss.hard={loss.hard:g}" if full else f"loss={loss.name}"
        raise ConfigError(
            f"{which} learns from what the teacher says of training rows, and"
            f" {cache.path or 'cache.train_targets=false'} keeps their text alone: use loss=full_kl loss.hard=0, or a"
            " cache with cache.train_targets=true"
        )


def _has_targets(config: Config) -> bool:
    """Whether the cache keeps what the teacher says of training rows."""
    if not config.cache.path:
        return config.cache.train_targets
    folder = _cached(config)
    if folder is None or not (folder / MANIFEST).is_file():
        return True
    return bool(described(folder).get("train_targets", True))


def _has_answers(config: Config) -> bool:
    """Whether a cache says which tokens are answers; of one that is still to be had, it shows when it is there."""
    folder = _cached(config)
    if folder is None:
        return True
    return (folder / MANIFEST).is_file() and bool(described(folder).get("answers"))


def _lacks_tail(config: Config) -> bool:
    """True for a cache of the older scripts, and for one that was imported from it as it was."""
    folder = _cached(config)
    if folder is None:
        return False
    if (folder / MANIFEST).is_file():
        return described(folder).get("tail") == "missing"
    return config.cache.tail is Tail.exact and any(folder.glob("shard_*.pt"))
