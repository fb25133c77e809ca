"""The run log and the report, written anew from what all runs left."""

from pathlib import Path

from qat.config import Config
from qat.console import console
from qat.report import log, page


def main(config: Config) -> None:
    """`stage=report`."""
    outputs = Path(config.outputs)
    for path in (log.write(outputs), page.write(outputs)):
        console.say("", whole=str(path))
