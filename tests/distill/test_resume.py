"""Real processes: killed at any step and gone on with, and two that share each batch."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = [
    "stage=distill",
    "instance.precision=fp32",
    "train.steps=14",
    "train.batch_size=4",
    "train.eval_every=5",
    "train.save_every=3",
    "train.lr=1e-2",
    "mode=e2e",
    "train.learn.latent=1",
    "train.learn.norms=1",
]
FILES = ("tables", "latent", "norms")


def start(outputs: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "launch.py", "+debug=tiny", f"outputs={outputs}", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> list[str]:
    """SHA-256 of everything that was learned."""
    last = folder / "checkpoints" / "last"
    return [hashlib.sha256((last / f"{name}.safetensors").read_bytes()).hexdigest() for name in FILES]


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder with a conversion to start from."""
    folder = tmp_path_factory.mktemp("resume") / "outputs"
    finish(start(folder, "stage=convert", "instance.precision=fp32"))
    return folder


@pytest.fixture(scope="module")
def training(outputs):
    """The words of a training from that conversion."""
    result = json.loads((outputs / "SR-001" / "result.json").read_text())
    return [*TRAINING, f"checkpoint={result['paths']['conversion']}"]


@pytest.fixture(scope="module")
def whole(outputs, training):
    """The folder of a run that nobody disturbed."""
    finish(start(outputs, *training))
    return outputs / "SR-002"


def test_killed_at_any_step_a_run_goes_on_to_the_same_bits(outputs, training, whole):
    draw = random.Random(1)
    process = start(outputs, *training)
    folder = outputs / "SR-003"
    for _ in range(2):
        reached = steps(folder) + draw.randint(1, 5)
        end = time.monotonic() + 60
        while steps(folder) < reached and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert json.loads((folder / "result.json").read_text())["status"] != "failed"
        process = start(outputs, *training, "run.resume=SR-003")
    finish(process)
    assert digests(folder) == digests(whole)
    assert rows(folder) == rows(whole)
    result, expected = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert result["metrics"] == expected["metrics"] and result["status"] == "complete"
    assert len(list((folder / "checkpoints").glob("state-*"))) == 2


def test_a_signal_saves_first(outputs, training, whole):
    process = start(outputs, *training)
    folder = max(outputs.glob("SR-*"))
    while max(outputs.glob("SR-*")) == whole or not steps(folder := max(outputs.glob("SR-*"))):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    result = json.loads((folder / "result.json").read_text())
    if process.returncode == 130:  # it was quicker than the signal otherwise
        assert result["status"] == "interrupted"
        assert max(folder.glob("checkpoints/state-*")).name == f"state-{steps(folder):08d}"
    finish(start(outputs, *training, f"run.resume={folder.name}"))
    assert digests(folder) == digests(whole) and rows(folder) == rows(whole)


@pytest.mark.parametrize("launcher", ["instance.devices=2", "torchrun"])
def test_two_processes_train_as_one(outputs, training, whole, launcher):
    plain = [word for word in training if "latent" not in word]  # an index may turn on a rounding error
    finish(start(outputs, *plain))
    one = max(outputs.glob("SR-*"))
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "launch.py"]
        command += ["+debug=tiny", f"outputs={outputs}", *plain]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    else:
        finish(start(outputs, *plain, launcher))
    two = max(outputs.glob("SR-*"))
    assert int(two.name[3:]) == int(one.name[3:]) + 1
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
