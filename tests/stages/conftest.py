"""Jobs on models that lie in a folder, within this process. A module says where with its fixture `place`."""

import json
import random

import pytest

from qat.cli import arguments, main
from qat.stages import run_job

QUICK = ("+debug=tiny", "model=local", "instance.precision=fp32", "evaluate.sample_tokens=1")
RANKS = ("quant.mlp.rank=2", "quant.attn.rank=2")  # of the default formats


def write_text(path):
    """Some paragraphs of few letters."""
    draw = random.Random(0)
    paragraphs = [" ".join("".join(draw.choices("abcdefg", k=5)) for _ in range(12)) for _ in range(24)]
    path.write_text("\n\n".join(paragraphs))


@pytest.fixture(scope="module")
def configured(place):
    """The checked configuration of a command line."""

    def make(model, *words):
        ranks = () if any(word.startswith("quant=") for word in words) else RANKS
        line = (*QUICK, *ranks, f"model.path={place / model}", f"outputs={place / 'outputs'}", *words)
        return main.check(arguments.parse(list(line))).configs[0]

    return make


@pytest.fixture(scope="module")
def job(configured, place):
    """Runs a job in a folder of its own; returns the folder and its record."""

    def run(model, *words):
        config = configured(model, *words)
        folder = place / "outputs" / f"SR-{len(list(place.glob('outputs/SR-*'))) + 1:03d}"
        folder.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qat.machine.matmul_flops", lambda machine: 1e11)
            run_job(config, folder)
        return folder, json.loads((folder / "result.json").read_text())

    return run
