"""What Tab offers: by itself, and through Hydra's own function in a real bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import schema
from qat.cli.completion import complete
from qat.config import Stage
from qat.identities import note

ROOT = Path(__file__).resolve().parents[2]

CASES = [
    ("qua", ["quant.", "quant="]),
    ("quant=q3", ["quant=q3a4_r8"]),
    ("-m quant=q2a4,q3", ["quant=q2a4,q3a4_r8"]),
    ("+experiment=qui", ["+experiment=quick"]),
    ("quant=q2a4 train.st", ["train.steps="]),
    ("train.lea", ["train.learn."]),
    ("first.train.learn.n", ["first.train.learn.norms="]),
    ("instance.prec", ["instance.precision="]),
    ("instance.precision=b", ["instance.precision=bf16"]),
    ("mode.mlp=", ["mode.mlp=false", "mode.mlp=true"]),
    ("stage=d", ["stage=distill", "stage=doctor"]),
    ("--mult", ["--multirun"]),
    ("train.lr=", []),
    ("nothing", []),
    ("nothing=", []),
]


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_offers(typed, offered, here):
    assert complete(f"python launch.py {typed}") == offered


def test_a_new_word_may_become_any_setting():
    heads = {word.rstrip("=.") for word in complete("python launch.py stage=run ")}
    top = {name.partition(".")[0] for name in list(schema.keys())}
    assert heads == top | set(schema.EXTRAS)


def test_every_word_of_stage():
    assert set(complete("python launch.py stage=")) == {f"stage={stage.name}" for stage in Stage}


def test_runs_and_files(here):
    (here / "outputs" / "SR-007").mkdir(parents=True)
    (here / "outputs" / "sweep-001" / "SR-008").mkdir(parents=True)
    note(here / "outputs", "SR-009", here / "mine")
    assert complete("python launch.py run.resume=") == [f"run.resume=SR-00{number}" for number in (7, 8, 9)]
    assert "checkpoint=SR-007" in complete("python launch.py checkpoint=")
    assert complete("python launch.py checkpoint=outputs/s") == ["checkpoint=outputs/sweep-001"]


BASH = """
PATH={folder}:$PATH
cd {root}
eval "$(python launch.py --shell-completion install=bash)"
complete -p python
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${{#line}} COMP_WORDS=($line) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    hydra_bash_completion
    echo "${{COMPREPLY[*]}}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_a_real_bash():
    lines = ["python launch.py quant=q3", "python launch.py quant=q2a4 stage=di", "python launch.py train.lea"]
    script = BASH.format(folder=Path(sys.executable).parent, root=ROOT)
    done = subprocess.run(["bash", "-c", script, "bash", *lines], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    registered, *offered = done.stdout.splitlines()
    assert "-F hydra_bash_completion python" in registered
    assert offered == ["quant=q3a4_r8", "stage=distill", "train.learn."]


def test_fish_gets_one_a_line(launch_alone, monkeypatch, here):
    monkeypatch.setenv("COMP_LINE", "python launch.py stage=d")
    done = launch_alone("--shell-completion", "query=fish")
    assert (done.code, done.out, done.heavy) == (0, "stage=distill\nstage=doctor\n", [])
    assert list(here.iterdir()) == []
