"""Every command of docs/DEPLOY.md, on the tiny model: from a job to an answer of the engine."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.launching import LAUNCH, Python

ROOT = Path(__file__).resolve().parents[1]
TINY = ("model=tiny", "+debug=tiny", "data.documents=64", "evaluate.sample_tokens=1", "train.eval_every=2")
TEXT = (ROOT / "docs" / "DEPLOY.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?^```bash\n(.*?)^```", TEXT, re.M | re.S))
ENGINES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["engines"]
NEEDS = {"llama.cpp": ("xllamacpp",), "MLX": ("mlx.core", "mlx_lm"), "transformers and vLLM": ("compressed_tensors",)}
NEEDS["PEFT"] = ("peft",)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """What jobs share."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize("section", NEEDS)
def test_commands_lead_to_an_answer(section, artifacts, tmp_path, monkeypatch):
    for name in NEEDS[section]:
        pytest.importorskip(name, reason=f"the engine {name} is not installed: pip install -e '.[engines]'")
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs/artifacts").symlink_to(artifacts)
    train, export, install, answer = SECTIONS[section].splitlines()
    job = re.search(r"^JOB *:= launch.py (.*)$", (ROOT / "Makefile").read_text(), re.M)
    run(LAUNCH, *job[1].split(), *re.match(r'make run ARGS="(.*)"$', train)[1].split(), *TINY)
    run(LAUNCH, *shlex.split(export)[2:], *TINY)
    assert any(engine.startswith(install.removeprefix("pip install ")) for engine in ENGINES)
    words = shlex.split(answer)
    if words[0] == "python":
        said = run(*words[1:])
    else:
        module, _, command = words[0].partition(".")
        said = run("-m", module, command, *words[1:], "--max-tokens", "4").split("==========")[1]
    assert said.strip()


def run(*words: str) -> str:
    """What a command prints that goes well."""
    code, out, err = Python(*words, before=one_thread).ended()
    assert code == 0, out + err
    return out


def one_thread() -> None:
    """Has llama.cpp compute in one thread: several wait for each other busily, for seconds where cores are taken."""
    if importlib.util.find_spec("xllamacpp") is None:
        return
    import xllamacpp

    class OneThread(xllamacpp.CommonParams):
        def __init__(self) -> None:
            self.cpuparams.n_threads = self.cpuparams_batch.n_threads = 1

    xllamacpp.CommonParams = OneThread
