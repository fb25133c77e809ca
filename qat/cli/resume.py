"""`run.resume=SR-007`: continues an interrupted run in its own folder, with the same configuration."""

from pathlib import Path

from qat import names
from qat.cli import recorded
from qat.config import Config, Stage, as_plain
from qat.errors import ConfigError
from qat.identities import RESULT, sweep
from qat.installation import command
from qat.records import Record, read
from qat.shaping import flat, shaping


def check(config: Config) -> None:
    """Checks that the run to resume exists and has this configuration.

    Raises:
        ConfigError: the run is not there, or the first key that differs.
    """
    name = config.run.resume
    if name is None:
        return
    if config.stage not in (Stage.run, Stage.distill):
        raise ConfigError(f"run.resume={name}: only training goes on, with stage=run or stage=distill")
    file = _folder(config, name) / recorded.FILE
    before = dict(flat(names.comparable(recorded.read(file))))
    kept = dict(flat(shaping(config)))
    for key, value in flat(names.comparable(as_plain(config))):
        was = before.get(key, value)
        if key in kept and was != value:
            raise ConfigError(
                f"run.resume={name}: {key} was {was} there and is {value} here;"
                f" `{command()} --config-path {file.parent} run.resume={name}` goes on with it as it was"
            )


def is_complete(config: Config) -> bool:
    """True where the run to be resumed is already complete."""
    return config.run.resume is not None and _record(config).status == "complete"


def conclude(config: Config) -> str:
    """Finishes a complete run that was killed right after its end; returns a message about it."""
    from qat import transfer
    from qat.report import log as run_log

    record, outputs = _record(config), Path(config.outputs)
    sweep(outputs)
    run_log.refresh(outputs)
    with transfer.mirrored(config.store, record.folder, record.run_id):
        pass  # it is copied at the end
    return f"{record.run_id} is complete and stays as it is: {record.folder / RESULT}"


def _record(config: Config) -> Record:
    return read(_folder(config, str(config.run.resume)), Path(config.outputs))


def _folder(config: Config, name: str) -> Path:
    try:
        return names.run(name, Path(config.outputs))
    except ConfigError as error:
        raise ConfigError(f"run.resume={error}") from error
