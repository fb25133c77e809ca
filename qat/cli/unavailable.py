"""What the design names and this version does not do: refused in one sentence before anything starts."""

from collections.abc import Iterator
from pathlib import Path

from qat.cli.validate import check_checkpoint
from qat.config import Config, DataSource, Stage, StoreKind, as_plain
from qat.errors import UnavailableError
from qat.store.names import cache_name, checkpoint_names, is_there, local_folder

USES_CACHE = (Stage.run, Stage.cache, Stage.convert, Stage.distill, Stage.evaluate)
USES_CHECKPOINT = (Stage.run, Stage.convert, Stage.distill, Stage.evaluate, Stage.chat)


def check(config: Config) -> None:
    """Refuses a valid configuration that cannot run yet.

    Raises:
        UnavailableError: the run needs machinery that is not built yet.
    """
    for sentence in missing(config):
        raise UnavailableError(sentence)


def missing(config: Config) -> Iterator[str]:
    """One sentence for each thing this run would need and not find."""
    if config.stage is Stage.export:
        yield f"export={config.export.name} is not built yet; a checkpoint folder holds its tables as safetensors"
    if config.stage in USES_CACHE:
        yield from _text(config)
    if config.stage in USES_CHECKPOINT:
        yield from _start(config)


def _text(config: Config) -> Iterator[str]:
    if config.cache.path is not None:
        yield "cache=local is not built yet: caches are made from data and model, and reused when they are there"
    if config.data.path is None and config.data.source is DataSource.alpaca and not _named_cache(config):
        yield f"data={config.data.name} from the hub is not built yet: give a local file, data.path=<file>"
    if config.data.thinking == "both" and config.data.source is not DataSource.selfgen:
        yield f"data.thinking=both is not built yet for data={config.data.name}: use true or false"


def _start(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.name == "teacher":
        return
    if checkpoint.path is None:
        if config.store.kind is StoreKind.local and not _pulled(config, "checkpoints", checkpoint_names(checkpoint)):
            yield (
                f"checkpoint={checkpoint.name} is not in {config.outputs}/checkpoints/{checkpoint.name}: put it there,"
                " or name the store that has it, as in store=gdrive"
            )
    elif config.stage is Stage.convert or (config.stage is Stage.run and _other_quant(config)):
        yield (
            "converting from a checkpoint is not built yet: use checkpoint=teacher, or train the checkpoint as it is"
            " with its own quant"
        )


def _named_cache(config: Config) -> bool:
    """True where a registered cache is there or may be in the store."""
    name = cache_name(config)
    return name is not None and (config.store.kind is not StoreKind.local or _pulled(config, "caches", [name]))


def _pulled(config: Config, kind: str, wanted: list[str]) -> bool:
    return any(is_there(local_folder(Path(config.outputs), kind, name), kind) for name in wanted)


def _other_quant(config: Config) -> bool:
    """True where the checkpoint's tables are not of the configured bits and ranks."""
    manifest = check_checkpoint(config)
    wanted = as_plain(config.quant)
    return manifest is None or any(manifest["quant"].get(kind) != wanted[kind] for kind in ("mlp", "attn"))
