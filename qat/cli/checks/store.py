"""Checks the store, and what is pulled from it or pushed to it."""

from qat import names
from qat.cli.checks.checkpoint import start
from qat.config import Config, Stage, StoreConfig, StoreKind
from qat.errors import ConfigError

MOVES = (Stage.pull, Stage.push, Stage.store)


def check(config: Config) -> None:
    """Checks that a store is named where one is needed, and that what is pulled or pushed is named."""
    store = config.store
    _check_place(store)
    if store.kind is StoreKind.local and (config.stage in MOVES or store.mirror):
        what = "store.mirror=true" if store.mirror else f"stage={config.stage.name}"
        raise ConfigError(f"{what} needs a store: store=gdrive, gcs, hf or url")
    if store.archive and (store.archive[0] in "./" or ".." in store.archive.split("/")):
        raise ConfigError(f"store.archive={store.archive}: a name, or a path as stage=store lists it")
    if config.stage is Stage.push:
        _check_push(config)
    if config.stage is Stage.pull:
        _check_pull(config)


def _check_place(store: StoreConfig) -> None:
    if store.kind not in (StoreKind.local, StoreKind.gdrive) and not store.path:
        raise ConfigError(f"store={store.name} needs a place: store.path=<folder, bucket or repository>")
    if store.kind is StoreKind.url and "://" not in str(store.path):
        raise ConfigError(f"store.path={store.path}: not a URL, such as s3://bucket/prefix or file:///folder")


def _check_pull(config: Config) -> None:
    """Checks that what is to be pulled is named."""
    named = config.checkpoint.name != names.TEACHER or names.cache_names(config)
    if not (config.store.archive or named):
        raise ConfigError(
            "stage=pull needs a name: checkpoint=q4_fp32, cache=alpaca_L64, or store.archive=<name> (stage=store lists"
            " them)"
        )


def _check_push(config: Config) -> None:
    """Checks that what is to be pushed is named and exists here, and that its name in the store is valid."""
    if "/" in (config.store.archive or ""):
        raise ConfigError(f"store.archive={config.store.archive}: a name, with no folders in it")
    place = start(config) or names.cached(config)
    if place is None:
        raise ConfigError("stage=push needs something to push: checkpoint=<run, name or path> or cache.path=<folder>")
    if not place.exists():
        raise ConfigError(f"stage=push: {place} is not there: pull or unpack it first")
