"""Pictures that are not drawn: a picture takes a tiny run as long as its training does, and two are drawn in each."""

from typing import Any

from matplotlib.cbook import open_file_cm
from matplotlib.figure import Figure


def savefig(figure: Figure, file: Any, **named: Any) -> None:
    """Writes how every PNG file begins, and no more."""
    with open_file_cm(file, "wb") as opened:
        opened.write(b"\x89PNG\r\n\x1a\n")
