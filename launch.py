"""The front door of a clone: `python launch.py` is `qat` without installing it, and `--help` says how."""

import sys

from qat.cli.launch import main

# The shell function that Hydra writes for Tab completes `python <file>` where the file has the words @hydra.main in it.

if __name__ == "__main__":
    sys.exit(main())
