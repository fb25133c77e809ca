"""A command line without its stages: everything up to the job, and a job that only leaves a trace."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qat.cli import arguments, main
from qat.config import Config
from tests import described
from tests.launching import python

ROOT = Path(__file__).resolve().parents[2]

DRIVER = f"""
import json, logging, os, pathlib, runpy, signal, sys, types
sys.path.insert(0, {str(ROOT)!r})
from qat.errors import MissingError

def run_job(config, folder, command="", overrides=()):
    def leave(status, error=None):
        result = {{"run_id": folder.name, "status": status, "error": error, "command": command,
                  "overrides": overrides, "metrics": {{"kl": config.train.lr}},
                  "lr": config.train.lr, "quant": config.quant.name}}
        (folder / "result.json").write_text(json.dumps(result))
        with open("trace.txt", "a") as trace:
            trace.write(folder.name + "\\n")

    if config.run.goal == "fail" and not pathlib.Path("mended").exists():
        leave("failed", "nothing there")
        raise MissingError("nothing\\nthere")
    if config.run.goal == "stop" and not pathlib.Path("mended").exists():
        leave("interrupted")
        raise KeyboardInterrupt
    if config.run.goal in ("die", "crash", "vanish") and not pathlib.Path("mended").exists():
        if config.run.goal == "die":
            leave("interrupted")
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSEGV) if config.run.goal == "crash" else os._exit(3)
    if config.run.goal == "break" and not pathlib.Path("mended").exists():
        leave("failed", "ZeroDivisionError: division by zero")
        1 / 0
    logging.getLogger("qat").info("at work")
    leave("complete")
    return 0.5

stages = types.ModuleType("qat.stages")
stages.run_job = run_job
stages.check = lambda config: None
sys.modules["qat.stages"] = stages
sys.argv = ["launch.py", *sys.argv[1:]]
try:
    runpy.run_path({str(ROOT / "launch.py")!r}, run_name="__main__")
finally:
    heavy = sorted({{"torch", "transformers", "numpy"}} & set(sys.modules))
    open("imported.json", "w").write(json.dumps(heavy))
"""

ONCE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests import composing
composing.once()
"""


@dataclass
class Outcome:
    """What a person sees of a launch."""

    code: int
    out: str
    err: str
    heavy: list[str]
    ran: list[str]  # folders of the jobs that ran, in order


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compose(here: Path) -> Callable[..., Config]:
    """The checked configuration of a command line, its first job's for a sweep."""
    return lambda *argv: main.check(arguments.parse(list(argv))).configs[0]


@pytest.fixture
def launch(here: Path) -> Callable[..., Outcome]:
    """Runs launch.py in a process of its own, its stages replaced by a trace."""
    return lambda *argv: outcome(python("-c", DRIVER, *argv))


@pytest.fixture(scope="session")
def launch_alone() -> Callable[..., Outcome]:
    """The same in an interpreter that has imported nothing yet, in the current directory."""
    alone = [sys.executable, "-c", ONCE + DRIVER]
    return lambda *argv: outcome(subprocess.run([*alone, *argv], capture_output=True, text=True, timeout=60))


def outcome(done: "subprocess.CompletedProcess[str]") -> Outcome:
    imported, trace = Path("imported.json"), Path("trace.txt")
    heavy = json.loads(imported.read_text())
    ran = trace.read_text().split() if trace.exists() else []
    imported.unlink(), trace.unlink(missing_ok=True)
    return Outcome(done.returncode, done.stdout, done.stderr, heavy, ran)


@pytest.fixture
def checkpoint(here: Path) -> Callable[..., Path]:
    """Makes a checkpoint folder that only has a manifest."""

    def make(folder: str, mlp: bool = True, attn: bool = True) -> Path:
        path = here / folder
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps(described.checkpoint(mlp, attn)))
        return path

    return make
