"""Commands in the documents can be typed: each composes, and the notebook is one."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qat.cli import arguments, job, main
from tests.launching import LAUNCH, python

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = json.loads((ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))
PYTHON = "python launch.py"


def in_notebook() -> list[str]:
    cells = ("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    return [line[1:] for cell in cells for line in cell.splitlines() if line.startswith(f"!{PYTHON}")]


def in_documents() -> list[str]:
    """Lines of code blocks, and code inside a sentence; not those that leave something out."""
    found = []
    for path in DOCUMENTS:
        if path.name == "EXTENDING.md":  # its options are there once its recipes are followed
            continue
        text = path.read_text(encoding="utf-8")
        found += re.findall(rf"^{PYTHON}.*$", text, re.MULTILINE) + re.findall(rf"`({PYTHON}[^`]*)`", text)
    return sorted({line for line in found if not re.search("[…<]", line)})


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)[2:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An outputs folder with two recorded runs."""
    config, outputs = main.check(arguments.parse([])).configs[0], tmp_path_factory.mktemp("recorded") / "outputs"
    for name in ("SR-001", "SR-002"):
        (outputs / name).mkdir(parents=True)
        job.record(config, outputs / name)
    return outputs


@pytest.fixture
def runs(recorded, tmp_path, monkeypatch):
    """A current directory with a copy of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "outputs")


@pytest.mark.parametrize("line", [*in_documents(), *in_notebook()])
def test_a_command_of_a_document_composes(line, runs, capfd):
    typed = words(line)
    if {"-m", "-sc"} & set(typed):
        command = arguments.parse(typed)
        assert command.flags["shell_completion"] or main.check(command).jobs
    else:
        code = main.main([*typed] if "--help" in typed else [*typed, "--cfg", "job"], lambda: None)
        assert code == 0, capfd.readouterr().err


@pytest.mark.parametrize("line", [in_notebook()[0], *(line for line in in_notebook() if "--config-path" in line)])
def test_a_command_of_the_notebook_composes_in_a_process(line, runs):
    done = python(LAUNCH, *words(line), "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen3_0_6b" in done.stdout or "--config-path" in line or "stage=" in line


def test_the_notebook_goes_all_the_way():
    typed = "\n".join(in_notebook())
    for step in ("stage=doctor", "stage=convert", "instance=t4", "instance=a100", "store.mirror=true"):
        assert step in typed
    for step in ("stage=pull", "run.resume=", "stage=chat", "export=packed", "stage=report"):
        assert step in typed


def test_the_notebook_is_one():
    """Version 4.5 of the format, as far as it asks anything of cells that have not run."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert isinstance(NOTEBOOK["metadata"], dict)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None and cell["outputs"] == []
        assert set(cell) == keys and cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])


def test_python_in_the_notebook_compiles():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            plain = [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("!", "%"))]
            compile("\n".join(plain), cell["id"], "exec")


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"
