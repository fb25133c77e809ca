"""What a wheel installs: the command `qat`, which needs no clone, from any folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launching

ROOT = Path(__file__).resolve().parents[1]
OWN = "# mine alone\nmlp: {bits: 3, rank: 2}\nattn: null\n"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None,
    reason="pip or hatchling, which build the package, are not installed: pip install -e '.[dev]'",
)


def pip(*words):
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, "-m", "pip", "-q", *words], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The folder that a wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder))
    (wheel,) = folder.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


@pytest.fixture
def typed(target, tmp_path, monkeypatch):
    """Runs a command of the installed package in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = f"{target / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QAT_")}
    environment = kept | {"PYTHONPATH": str(target), "PATH": path, "WANDB_MODE": "disabled"}

    def run(*words):
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_everything_travels(target):
    inside = {path.relative_to(target / "qat") for path in (target / "qat").rglob("*") if path.is_file()}
    listed = subprocess.run(["git", "ls-files", "qat", "conf"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout to compare with")
    tracked = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    assert {path.relative_to("qat") if path.parts[0] == "qat" else path for path in tracked} <= inside
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["bin", "qat"]


def test_help_and_errors_say_how_it_was_started(typed, target):
    helped = typed("qat", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "\n  qat stage=doctor  " in helped.stdout and "launch.py" not in helped.stdout
    module = typed(sys.executable, "-m", "qat", "--help")
    assert module.stdout.replace("python -m qat", "qat").split() == helped.stdout.split()
    wrong = typed("qat", "quant=q2a5")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "did you mean q2a4?" in wrong.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_tab_completes_the_command(typed):
    script = """
        eval "$(qat -sc install=bash)"
        complete -p qat
        COMP_LINE="qat stage=di" COMP_POINT=12 COMP_WORDS=(qat stage=di) COMP_CWORD=1
        hydra_bash_completion
        echo "${COMPREPLY[*]}"
    """
    done = typed("bash", "-c", script)
    assert done.stderr == ""
    registered, offered = done.stdout.splitlines()
    assert registered.endswith("-F hydra_bash_completion qat") and offered == "stage=distill"


def test_processes_that_it_starts_are_of_this_package_and_say_what_was_typed(typed):
    Path("qat.py").write_text("raise SystemExit('not this one')\n")
    code = """if True:
        import os, subprocess, sys
        sys.argv[0] = "/any/bin/qat"
        from qat import installation
        words, told = installation.again()
        del os.environ["PYTHONPATH"]
        sys.exit(subprocess.run([*words, "--help"], env=os.environ | told).returncode)
    """
    done = typed(sys.executable, "-P", "-c", code)
    assert (done.returncode, done.stderr) == (0, "") and "\n  qat stage=doctor  " in done.stdout


def test_a_run_with_an_own_option_lands_below_the_current_folder(target, tmp_path, monkeypatch):
    """Forked with libraries in it; tests/footprint/test_taken.py has runs in interpreters that start afresh."""
    monkeypatch.chdir(tmp_path)
    Path("conf/quant").mkdir(parents=True)
    Path("conf/quant/mine.yaml").write_text(OWN)
    words = ("+debug=tiny", "quant=mine", "mode=mlp")
    done = launching.python("-c", launching.of_a_copy(target, str(target / "bin" / "qat")), *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    record = json.loads(Path("outputs/SR-001/result.json").read_text())
    assert record["status"] == "complete" and record["command"] == f"qat {' '.join(words)}"
    assert "go on with        qat stage=chat checkpoint=SR-001\n" in done.stdout
    assert "launch.py" not in done.stdout
    header = Path("outputs/SR-001/config_resolved.yaml").read_text().splitlines()[1]
    assert header == "#   qat --config-path <this folder> --config-name config_resolved"
    assert sorted(path.name for path in Path().iterdir()) == ["conf", "outputs"]
