"""A format is a package that declares itself: what it refuses, how it is used, and what writes it."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qat.export
from qat.config import CONF, FORMATS, Config, ExportConfig, ExportType
from qat.errors import UnavailableError
from qat.export import coreml
from qat.export.exporter import Exporter, exporter
from tests import described

DECLARATION = '''
"""Like hf, in one type."""

from qat.config import ExportType
from qat.errors import ConfigError
from qat.export.exporter import Exporter


def refuse(config):
    if config.export.context == 7:
        raise ConfigError("export.context=7: mine cannot")


EXPORTER = Exporter(types=(ExportType.fp32,), use="Only `{folder}` knows.", library="mine", refuse=refuse)
'''
WRITER = "from qat.export.hf.writer import read, rounding, write\n"
*OTHERS, LAST = sorted([*FORMATS, "mine"])
REFUSED = {
    "export.dtype=bf16": "export.dtype=bf16: export=mine is written in fp32",
    "export.context=7": "export.context=7: mine cannot",
    "export.format=min": f"export.format=min: must be {', '.join(OTHERS)} or {LAST} (did you mean mine?)",
}
ROOT = Path(qat.export.__file__).parents[2]


def add(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(DECLARATION)
    (folder / "writer.py").write_text(WRITER)


@pytest.mark.parametrize("name", FORMATS)
def test_each_declares_itself_and_has_an_option(name):
    declared = exporter(name)
    assert declared.types and declared.use.format(folder="there")
    assert importlib.util.find_spec(f"qat.export.{name}.writer")
    option = yaml.safe_load((CONF / "export" / f"{name}.yaml").read_text())
    assert option["format"] == name and ExportType[option["dtype"]] in declared.types


def test_core_ml_without_its_tools_is_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(coreml, "find_spec", lambda name: None)
    config = Config(export=ExportConfig("coreml", "coreml", ExportType.fp16))
    config.checkpoint.name = "local"
    with pytest.raises(UnavailableError, match=r"^export=coreml needs coremltools: run `pip install"):
        exporter("coreml").check(config, {})


def test_a_new_format_is_written_by_its_package_alone(best, export, tmp_path, monkeypatch):
    add(tmp_path / "mine" / "scratch_format")
    monkeypatch.setattr(qat.export, "__path__", [*qat.export.__path__, str(tmp_path / "mine")])
    assert isinstance(exporter("scratch_format"), Exporter)
    card = (export(best, "scratch_format") / "README.md").read_text()
    assert "Only `scratch_format-fp32` knows." in card and "library_name: mine" in card


def test_a_new_format_is_checked_by_its_package_alone(tmp_path):
    """In a copy of the project with a format more, which is its package and an option."""
    for name in ("qat", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    add(tmp_path / "qat" / "export" / "mine")
    (tmp_path / "conf" / "export" / "mine.yaml").write_text("# mine\nformat: mine\n")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "manifest.json").write_text(json.dumps(described.checkpoint()))
    code = "import sys\nfrom qat.cli import main\nfor line in sys.argv[1:]: main.main(line.split(), None)"
    lines = [f"stage=export export=mine export.output=new checkpoint=made {said}" for said in REFUSED]
    command = [sys.executable, "-c", code, *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stderr.splitlines() == [f"error: {told}" for told in REFUSED.values()]
