"""`run.resume=SR-007`: an interrupted run goes on in its own folder, as what it was."""

import os
from pathlib import Path
from typing import Any

import yaml

from qat.cli.arguments import RESOLVED
from qat.cli.suggest import did_you_mean
from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.report.records import RESULT, read
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
    file = Path(config.outputs) / name / f"{RESOLVED}.yaml"
    if os.path.basename(name) != name or not file.is_file():
        runs = sorted(path.name for path in Path(config.outputs).glob("SR-*"))
        raise ConfigError(f"run.resume={name}: no such run in {config.outputs}{did_you_mean(name, runs)}")
    try:
        before = dict(flat(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for key, value in flat(shaping(config)):
        recorded = _unescaped(before.get(key, value))
        if recorded != value:
            raise ConfigError(
                f"run.resume={name}: {key} was {recorded} there and is {value} here;"
                f" `python launch.py --config-path {file.parent} run.resume={name}` goes on with it as it was"
            )


def finished(config: Config) -> str | None:
    """What to say of a run that is complete, of which nothing is left to do; None of any other."""
    if config.run.resume is None:
        return None
    record = read(Path(config.outputs) / config.run.resume, Path(config.outputs))
    if record.status != "complete":
        return None
    return f"{record.run_id} is complete and stays as it is: {record.folder / RESULT}"


def _unescaped(value: Any) -> Any:
    """Text with `${` as it was before it was recorded."""
    return value.replace(r"\${", "${") if isinstance(value, str) else value
