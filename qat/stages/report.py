"""The run log and the report, written anew from what all runs left."""

from pathlib import Path

from qat.config import Config
from qat.console import console
from qat.errors import MissingError
from qat.report import log, page


def main(config: Config) -> None:
    """`stage=report`.

    Raises:
        MissingError: there is no outputs folder to report on.
    """
    outputs = Path(config.outputs)
    if not outputs.is_dir():
        raise MissingError(f"outputs={config.outputs} is not there: nothing has run yet")
    for path in (log.write(outputs), page.write(outputs)):
        console.say("", whole=str(path))
