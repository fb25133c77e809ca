"""Registered checkpoints, which are known by name: there, or in a store that the run may ask."""

from pathlib import Path

from qat.config import Config, Stage, StoreKind
from qat.errors import MissingError
from qat.store.names import checkpoint_names, is_there, local_folder

USES_CHECKPOINT = (Stage.run, Stage.convert, Stage.distill, Stage.evaluate, Stage.export, Stage.chat)


def check(config: Config) -> None:
    """Refuses a registered name that nothing can be found under, before anything starts.

    Raises:
        MissingError: it is not in the outputs folder, and no store is named.
    """
    checkpoint = config.checkpoint
    if config.stage not in USES_CHECKPOINT or checkpoint.name == "teacher" or checkpoint.path is not None:
        return
    places = [local_folder(Path(config.outputs), "checkpoints", name) for name in checkpoint_names(checkpoint)]
    if config.store.kind is StoreKind.local and not any(is_there(place, "checkpoints") for place in places):
        raise MissingError(
            f"checkpoint={checkpoint.name} is not in {config.outputs}/checkpoints/{checkpoint.name}: put it there, or"
            " name the store that has it, as in store=gdrive"
        )
