"""Reads manifests for the checks."""

from pathlib import Path
from typing import Any

from qat.artifacts import read_manifest
from qat.errors import ArtifactError, ConfigError


def described(folder: Path) -> dict[str, Any]:
    """The content of the manifest in a folder.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return read_manifest(folder)
    except ArtifactError as error:
        raise ConfigError(str(error)) from None
