"""A sweep killed again and again, in real processes: in the end every job is complete, once, as if nothing had been."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from qat.artifacts import open_artifact
from tests.launching import Launch

JOBS = 5
KILLS = 2
STOPPED = 3  # jobs of the sweep that Ctrl-C stops
STOPPED_AFTER = 3  # rows of the second job's figures
STEPS = 6
WORDS = [
    "-m",
    "+debug=tiny",
    "quant=q2a16",
    "data.documents=64",
    f"train.steps={STEPS}",
    "train.save_every=2",
    "evaluate.sample_tokens=1",
    "instance.precision=fp32",
]


def sweep(jobs):
    """The words of a sweep over so many rates."""
    return [*WORDS, f"train.lr={','.join(f'{number}e-3' for number in range(1, jobs + 1))}"]


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
    assert Launch(outputs, *sweep(JOBS)).ended()[0] == 0
    return outputs


@pytest.fixture
def outputs(twin, tmp_path):
    """Another outputs folder, in which what the jobs share is made already."""
    shutil.copytree(twin / "artifacts", tmp_path / "outputs" / "artifacts")
    return tmp_path / "outputs"


def test_sweep_killed_twice_at_random_ends_with_every_job_complete_and_equal_to_its_twin(twin, outputs):
    dice, killed = random.Random(3), outputs
    done: set[str] = set()
    for _ in range(KILLS):
        launch = Launch(killed, *sweep(JOBS))
        aim = len(done) + 1
        launch.wait_for(lambda aim=aim: len(complete(killed)) >= aim)
        time.sleep(dice.random() * 0.6)
        launch.send(signal.SIGKILL)
        launch.ended()
        assert done < complete(killed) and len(complete(killed)) < JOBS
        done = complete(killed)
    kept = {name: (killed / "sweep-001" / name / "result.json").stat().st_mtime_ns for name in done}
    assert Launch(killed, *sweep(JOBS)).ended()[0] == 0
    assert {name: (killed / "sweep-001" / name / "result.json").stat().st_mtime_ns for name in done} == kept
    assert complete(killed) == set(results(killed)) == {f"SR-{number:03d}" for number in range(1, JOBS + 1)}
    assert figures(killed) == figures(twin)
    (summary,) = killed.rglob("summary.json")
    assert {job["status"] for job in json.loads(summary.read_text())["jobs"]} == {"complete"}
    assert len(json.loads(summary.read_text())["jobs"]) == JOBS


def test_ctrl_c_saves_the_running_job_which_later_goes_on_from_there(twin, outputs):
    launch = Launch(outputs, *sweep(STOPPED))
    second = outputs / "sweep-001" / "SR-002" / "metrics.jsonl"
    launch.wait_for(lambda: second.is_file() and len(second.read_text().splitlines()) >= STOPPED_AFTER)
    launch.send(signal.SIGINT)
    code, out, err = launch.ended()
    assert code == 130
    told, left = out + err, STOPPED - len(complete(outputs))
    assert f"{left} of {STOPPED} jobs are left; to go on: python launch.py sweep.resume={outputs}/sweep-001" in told
    assert "interrupted\n" in told and "Traceback" not in told
    statuses = [result["status"] for result in results(outputs).values()]
    assert statuses.count("interrupted") == 1 and "failed" not in statuses
    assert "· interrupted" in (outputs / "RUNS.md").read_text()
    code, out, err = Launch(outputs, *sweep(STOPPED)).ended()
    assert code == 0
    (step,) = re.findall(rf"SR-002 goes on after step (\d+) of {STEPS}", out + err)
    assert int(step) > 0
    expected = figures(twin)
    assert figures(outputs) == {rate: expected[rate] for rate in sorted(expected)[:STOPPED]}
