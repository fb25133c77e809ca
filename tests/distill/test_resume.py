"""Real processes: stopped at any step and gone on with, and two that share each batch."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import launching

TRAINING = [
    "stage=distill",
    "instance.precision=fp32",
    "train.steps=11",
    "train.batch_size=4",
    "train.eval_every=5",
    "train.save_every=4",
    "train.lr=1e-2",
]
LEARNING = {"all": ["mode=e2e", "train.learn.latent=1", "train.learn.norms=1"], "adapters": ["mode=lora"]}
STOPS = {"all": [signal.SIGTERM, signal.SIGKILL], "adapters": [signal.SIGKILL]}
FILES = {"all": {"tables", "latent", "own"}, "adapters": {"tables", "adapter_model"}}


def job(words: list[str]) -> None:
    """What a process does: one launch."""
    from qat.cli import main
    from qat.cli.launch import launch

    launching.lighten()
    sys.exit(main.main(words, launch))


@pytest.fixture(scope="module")
def start():
    """Launches in processes that have imported everything already."""
    context = launching.processes()

    def launched(outputs, *words):
        process = context.Process(target=job, args=(["+debug=tiny", f"outputs={outputs}", *words],))
        process.start()
        return process

    return launched


def finish(process, code=0) -> None:
    process.join(120)
    assert process.exitcode == code


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that was learned, by file."""
    files = (folder / "checkpoints" / "last").glob("*.safetensors")
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.fixture(scope="module", params=LEARNING)
def learning(request):
    """What learns."""
    return request.param


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, start):
    """A folder with a conversion to start from."""
    folder = tmp_path_factory.mktemp("resume") / "outputs"
    finish(start(folder, "stage=convert", "instance.precision=fp32", "quant.embed={bits: 3, rank: 4}"))
    return folder


@pytest.fixture(scope="module")
def training(outputs, learning):
    """The words of a training from that conversion."""
    result = json.loads((outputs / "SR-001" / "result.json").read_text())
    return [*TRAINING, *LEARNING[learning], f"checkpoint={result['paths']['conversion']}"]


@pytest.fixture(scope="module")
def whole(outputs, training, start):
    """The folder of a run that nobody disturbed."""
    folder = outputs / next_run(outputs)
    finish(start(outputs, *training))
    return folder


@pytest.fixture(scope="module")
def shared(outputs, training):
    """That of two processes."""
    folder = outputs / next_run(outputs)
    code, _, err = together(outputs, *training).ended()
    assert code == 0, err
    return folder


def together(outputs, *words):
    """A launch of two processes."""
    words = (launching.LAUNCH, "+debug=tiny", f"outputs={outputs}", *words, "instance.devices=2")
    return launching.Python(*words, before=launching.fork_pythons)


def next_run(outputs) -> str:
    return f"SR-{len(list(outputs.glob('SR-*'))) + 1:03d}"


def test_stopped_at_any_step_a_run_goes_on_to_the_same_bits(outputs, training, whole, start, learning):
    """A signal saves first; `kill -9` loses the steps since the last state."""
    draw = random.Random(1)
    folder = outputs / next_run(outputs)
    process = start(outputs, *training)
    for number in STOPS[learning]:
        reached = steps(folder) + draw.randint(1, 4)
        end = time.monotonic() + 60
        while steps(folder) < reached and process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid, number)
        process.join(60)
        status = json.loads((folder / "result.json").read_text())["status"]
        if number == signal.SIGTERM:
            assert (process.exitcode, status) == (143, "interrupted")
            assert max(folder.glob("checkpoints/state-*")).name == f"state-{steps(folder):08d}"
        assert process.exitcode != 0 and status != "failed"
        process = start(outputs, *training, f"run.resume={folder.name}")
    finish(process)
    assert digests(folder) == digests(whole) and digests(whole).keys() == FILES[learning]
    assert rows(folder) == rows(whole)
    result, expected = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert result["metrics"] == expected["metrics"] and result["status"] == "complete"
    assert len(list((folder / "checkpoints").glob("state-*"))) == 2


def test_two_processes_train_as_one(shared, whole, learning):
    """Those of torchrun do in tests/test_ranks.py."""
    told = list(zip(rows(shared), rows(whole), strict=True))
    for ours, theirs in told if learning == "adapters" else told[:4]:  # later on, an index may turn on a rounding error
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("learning", ["all"], indirect=True, scope="module")  # adapters lie in no shards
def test_states_in_shards_go_on_to_the_same_bits(outputs, training, shared):
    """A killed process ends the other in a sentence, and the run then learns what one that nobody disturbed does."""
    folder = outputs / next_run(outputs)
    process = together(outputs, *training)
    process.wait_for(lambda: list(folder.glob("checkpoints/state-*")) and steps(folder) > 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    code, _, err = process.ended()
    said = [line for line in err.splitlines() if line.startswith(("error", "Traceback"))]
    assert code != 0 and said[0].startswith("error: another of the 2 processes that train together has ended")
    assert said[1:] == ["error: process 1 of 2 was killed"]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed" and "run.resume" in result["error"]
    code, _, err = together(outputs, *training, f"run.resume={folder.name}").ended()
    assert code == 0, err
    assert digests(folder) == digests(shared)
    assert rows(folder) == rows(shared)
