"""`run.resume=SR-007`: an interrupted run goes on in its own folder, as what it was."""

from pathlib import Path

from qat import names
from qat.cli import recorded
from qat.config import Config, Stage, as_plain
from qat.errors import ConfigError
from qat.identities import RESULT
from qat.report.records import read
from qat.shaping import flat, shaping


def check(config: Config) -> None:
    """The run to go on with is there, and its configuration is this one.

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
                f" `python launch.py --config-path {file.parent} run.resume={name}` goes on with it as it was"
            )


def finished(config: Config) -> str | None:
    """What to say of a run that is complete, of which nothing is left to do; None of any other."""
    if config.run.resume is None:
        return None
    record = read(_folder(config, config.run.resume), Path(config.outputs))
    if record.status != "complete":
        return None
    return f"{record.run_id} is complete and stays as it is: {record.folder / RESULT}"


def _folder(config: Config, name: str) -> Path:
    try:
        return names.run(name, Path(config.outputs))
    except ConfigError as error:
        raise ConfigError(f"run.resume={error}") from error
