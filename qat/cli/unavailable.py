"""What the design names and this version does not do: refused in one sentence before anything starts."""

from collections.abc import Iterator

from qat.config import Config, Stage, StoreKind
from qat.errors import UnavailableError

USES_CHECKPOINT = (Stage.run, Stage.convert, Stage.distill, Stage.evaluate, Stage.export, Stage.chat)


def check(config: Config) -> None:
    """Refuses a valid configuration that cannot run yet.

    Raises:
        UnavailableError: the run needs machinery that is not built yet.
    """
    for sentence in missing(config):
        raise UnavailableError(sentence)


def missing(config: Config) -> Iterator[str]:
    """One sentence for each thing this run would need and not find."""
    if config.stage is Stage.report:
        yield "stage=report is not built yet; each run's result.json, loss.png and samples.md are in its folder"
    if config.store.kind is not StoreKind.local:
        yield f"store={config.store.name} is not built yet: use store=local and give checkpoints by path"
    if config.stage in USES_CHECKPOINT:
        yield from _start(config)


def _start(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.name == "teacher":
        return
    if checkpoint.path is None:
        yield (
            f"checkpoint={checkpoint.name} is a registered archive and pulling from a store is not built yet:"
            " give the folder of a checkpoint, checkpoint=<path>"
        )
