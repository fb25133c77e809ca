"""A Core ML package, built on any machine: the whole model with its key-value cache, one token a call.

Core ML itself runs on Apple's systems only, so what is written is compared by a small interpreter before
it is published, and `check.py` beside the package compares it again where it is used.
"""

import logging
from importlib.util import find_spec

from qat.config import Config, ExportType
from qat.errors import UnavailableError
from qat.export.exporter import Exporter
from qat.installation import to_install

logging.getLogger("coremltools").setLevel(logging.ERROR)  # coremltools warns of every library that exists on Macs only


def refuse(config: Config) -> None:
    """Refuses the export unless Core ML's own tools are installed.

    Raises:
        UnavailableError: they are not installed.
    """
    if find_spec("coremltools") is None:
        raise UnavailableError(f"export={config.export.name} needs coremltools: run `{to_install('coreml')}`")


EXPORTER = Exporter(
    types=(ExportType.fp16,),
    library="coreml",
    bounded=True,
    samples=1,  # one prompt only: numpy computes it token by token, as slowly as other formats compute all prompts
    refuse=refuse,
    use="Open the `.mlpackage` with Core ML; on a Mac, `python check.py` compares it with the recorded numbers.",
)
