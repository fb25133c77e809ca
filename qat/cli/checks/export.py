"""Checks exports: the format supports the settings, and the folder is free or an older export."""

from pathlib import Path

from qat.artifacts import MANIFEST
from qat.checkpoint_files import has_adapters
from qat.cli.checks import checkpoint
from qat.cli.checks.manifests import described
from qat.cli.checks.outputs import check_folder
from qat.config import Config, Stage
from qat.errors import ConfigError
from qat.export.exporter import exporter


def check(config: Config) -> None:
    """Checks that the format can hold what is exported, and that the folder can be written."""
    if config.stage is not Stage.export:
        return
    export = config.export
    if not export.output:
        raise ConfigError("stage=export needs a folder to write to: export.output=<folder>")
    manifest = checkpoint.manifest(config)
    adapted = manifest is not None and has_adapters(manifest)
    exporter(export.format).check(config, manifest["layers"] if manifest else {}, adapted)
    folder = Path(export.output).expanduser()
    check_folder("export.output", str(folder))
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise ConfigError(f"export.output={export.output}: there are other files in it: name a new or empty folder")


def _is_export(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and described(folder).get("kind") == "export"
