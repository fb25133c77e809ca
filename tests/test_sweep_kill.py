"""A sweep killed and stopped, in real processes: in the end every job is complete, once, as if nothing had been."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from qat.artifacts import open_artifact
from tests.launching import Launch

JOBS = 3
STOPPED_AFTER = 3  # rows of the last job's figures
STEPS = 6
TINY = ["+debug=tiny", "quant=q2a16", "data.documents=64", "instance.precision=fp32"]
WORDS = [
    "-m",
    *TINY,
    "stage=distill",
    f"train.steps={STEPS}",
    "train.save_every=2",
    "train.eval_every=3",
    f"train.lr={','.join(f'{number}e-3' for number in range(1, JOBS + 1))}",
]


def start_of(outputs):
    """The words for a sweep over trainings of the conversion that is there."""
    (start,) = (outputs / "artifacts" / "checkpoints").glob("[!.]*")
    return [*WORDS, f"checkpoint={start}"]


def results(outputs):
    found = [json.loads(path.read_text()) for path in outputs.glob("sweep-*/*/result.json")]
    return {result["run_id"]: result for result in found}


def complete(outputs):
    return {name for name, result in results(outputs).items() if result["status"] == "complete"}


def figures(outputs):
    """What each job measured and made, by its learning rate."""
    return {
        result["config"]["train"]["lr"]: (
            result["metrics"],
            open_artifact(outputs / "sweep-001" / name / "checkpoints" / "best").manifest["files"],
            (outputs / "sweep-001" / name / "metrics.jsonl").read_text(),
        )
        for name, result in results(outputs).items()
    }


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The outputs of the same sweep, uninterrupted."""
    outputs = tmp_path_factory.mktemp("twin") / "outputs"
    assert Launch(outputs, *TINY, "stage=convert").ended()[0] == 0
    assert Launch(outputs, *start_of(outputs)).ended()[0] == 0
    return outputs


def rows_of(outputs, run):
    """How many rows of figures a job has so far."""
    path = outputs / "sweep-001" / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_sweep_killed_and_stopped_ends_with_every_job_complete_and_equal_to_its_twin(twin, tmp_path):
    """`kill -9` in the second job, and Ctrl-C in the third, which is saved first and goes on from there."""
    outputs, dice = tmp_path / "outputs", random.Random(3)
    shutil.copytree(twin / "artifacts", outputs / "artifacts")  # what the jobs share is made already
    words = start_of(outputs)
    launch = Launch(outputs, *words)
    launch.wait_for(lambda: rows_of(outputs, "SR-002"))
    time.sleep(dice.random() * 0.1)
    launch.send(signal.SIGKILL)
    launch.ended()
    done = complete(outputs)
    assert "SR-001" in done and len(done) < JOBS
    kept = times(outputs, done)
    launch = Launch(outputs, *words)
    launch.wait_for(lambda: rows_of(outputs, "SR-003") >= STOPPED_AFTER)
    launch.send(signal.SIGINT)
    code, out, err = launch.ended()
    assert code == 130
    told = out + err
    assert f"1 of {JOBS} jobs are left; to go on: python launch.py sweep.resume={outputs}/sweep-001" in told
    assert "interrupted\n" in told and "Traceback" not in told
    assert {name: result["status"] for name, result in results(outputs).items()} == {
        "SR-001": "complete",
        "SR-002": "complete",
        "SR-003": "interrupted",
    }
    assert "· interrupted" in (outputs / "RUNS.md").read_text()
    code, out, err = Launch(outputs, *words).ended()
    assert code == 0 and times(outputs, done) == kept
    (step,) = re.findall(rf"SR-003 goes on after step (\d+) of {STEPS}", out + err)
    assert int(step) > 0
    assert complete(outputs) == set(results(outputs)) == {f"SR-{number:03d}" for number in range(1, JOBS + 1)}
    assert figures(outputs) == figures(twin)
    (summary,) = outputs.rglob("summary.json")
    assert [job["status"] for job in json.loads(summary.read_text())["jobs"]] == ["complete"] * JOBS


def times(outputs, runs):
    """When each of some runs was recorded last."""
    return {name: (outputs / "sweep-001" / name / "result.json").stat().st_mtime_ns for name in runs}
