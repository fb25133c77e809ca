"""How this program came here, a clone or an installed package, and what a person types to start it."""

import os
import sys
from pathlib import Path

NAME = "qat-speedrun"  # of the distribution, in pyproject.toml
PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "conf").is_dir()  # a wheel has the options inside; a clone, and pip install -e, beside
ROOT = PACKAGE.parent  # a clone's own folder; of an installed package, where packages are
CONF = PACKAGE / "conf" if INSTALLED else ROOT / "conf"  # the options of each group
STARTED_AS = "QAT_STARTED_AS"  # variable that tells processes of one run how a person started the first


def command() -> str:
    """The words before the first setting, as this program was started: `qat` or `python launch.py`."""
    told = os.environ.get(STARTED_AS)
    script = Path(sys.argv[0] if sys.argv else "")
    known = {"qat": "qat", "qat.exe": "qat", "launch.py": "python launch.py"}
    if script == PACKAGE / "__main__.py":
        return told or "python -m qat"
    return known.get(script.name, "qat" if INSTALLED else "python launch.py")


def again() -> tuple[list[str], dict[str, str]]:
    """The words and the variables with which a process starts this program once more, whatever its folder."""
    # -P: a folder or file named qat in the current folder is not this package.
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), STARTED_AS: command()}
    return [sys.executable, "-P", "-m", "qat"], found


def to_install(extra: str) -> str:
    """What a person types to get the packages of one of this project's extras."""
    return f"pip install '{NAME}[{extra}]'" if INSTALLED else f"pip install -e '.[{extra}]'"
