"""What a run sets for its whole process, kept from the programs of those who use the library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from qat.console import console

BARS = "TQDM_DISABLE"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed; at the end other libraries say again what they said before."""
    from tqdm.std import tqdm
    from transformers.utils import logging

    level, bars, begin = logging.get_verbosity(), logging.is_progress_bar_enabled(), tqdm.__init__
    variable, silent = os.environ.get(BARS), console.quiet
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tqdm.__init__ = partialmethod(begin, disable=True)  # bars that nobody asks for one by one
    console.quiet = True
    try:
        yield
    finally:
        console.quiet, tqdm.__init__ = silent, begin
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if variable is None:
            os.environ.pop(BARS, None)
