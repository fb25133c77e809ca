"""A sweep killed again and again, in real processes: in the end every job is complete, once, as if nothing had been."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time

import pytest

from qat import machine
from qat.artifacts import open_artifact

JOBS = 10
RATES = ",".join(f"{number}e-3" for number in range(1, JOBS + 1))
SWEEP = [
    "-m",
    "+debug=tiny",
    f"train.lr={RATES}",
    "quant=q2a16",
    "data.documents=64",
    "train.steps=10",
    "train.save_every=2",
    "evaluate.sample_tokens=1",
    "instance.precision=fp32",
]


STOPPED_AFTER = 3  # rows of the second job's figures


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything already: forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch", "qat.stages.run", "qat.plots", "hydra._internal.hydra"])
    return context


def start(processes, outputs, *words):
    import launch
    from qat.cli import main

    arguments = (main.main, [*words, f"outputs={outputs}"], launch.launch, outputs.parent / "said")
    process = processes.Process(target=exit_with, args=arguments)
    process.start()
    return process


def exit_with(main, words, launch, said):
    machine.matmul_flops = lambda _: 1e11  # a second each time
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = main(words, launch)
        sys.stdout.flush()
        os._exit(code)


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
def twin(processes, tmp_path_factory):
    """The outputs of the same sweep, uninterrupted."""
    outputs = tmp_path_factory.mktemp("twin") / "outputs"
    plain = start(processes, outputs, *SWEEP)
    plain.join(200)
    assert plain.exitcode == 0
    return outputs


def test_sweep_killed_three_times_at_random_ends_with_every_job_complete_and_equal_to_its_twin(
    processes, twin, tmp_path
):
    dice, killed = random.Random(3), tmp_path / "killed"
    done: set[str] = set()
    for _ in range(3):
        process = start(processes, killed, *SWEEP)
        aim, end = len(done) + dice.randint(1, 3), time.monotonic() + 60
        while len(complete(killed)) < aim:
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(dice.random() * 0.8)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert done < complete(killed) and len(complete(killed)) < JOBS
        done = complete(killed)
    kept = {name: (killed / "sweep-001" / name / "result.json").stat().st_mtime_ns for name in done}
    last = start(processes, killed, *SWEEP)
    last.join(100)
    assert last.exitcode == 0
    assert {name: (killed / "sweep-001" / name / "result.json").stat().st_mtime_ns for name in done} == kept
    assert complete(killed) == set(results(killed)) == {f"SR-{number:03d}" for number in range(1, JOBS + 1)}
    assert figures(killed) == figures(twin)
    (summary,) = killed.rglob("summary.json")
    assert {job["status"] for job in json.loads(summary.read_text())["jobs"]} == {"complete"}
    assert len(json.loads(summary.read_text())["jobs"]) == JOBS


def test_ctrl_c_saves_the_running_job_which_later_goes_on_from_there(processes, twin, tmp_path):
    outputs = tmp_path / "outputs"
    process = start(processes, outputs, *SWEEP)
    second, end = outputs / "sweep-001" / "SR-002" / "metrics.jsonl", time.monotonic() + 60
    while not second.is_file() or len(second.read_text().splitlines()) < STOPPED_AFTER:
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    told, left = (tmp_path / "said").read_text(), JOBS - len(complete(outputs))
    assert f"{left} of {JOBS} jobs are left; to go on: python launch.py sweep.resume={outputs}/sweep-001" in told
    assert "interrupted\n" in told and "Traceback" not in told
    statuses = [result["status"] for result in results(outputs).values()]
    assert statuses.count("interrupted") == 1 and "failed" not in statuses
    assert "· interrupted" in (outputs / "RUNS.md").read_text()
    last = start(processes, outputs, *SWEEP)
    last.join(200)
    assert last.exitcode == 0
    (step,) = re.findall(r"SR-002 goes on after step (\d+) of 10", (tmp_path / "said").read_text())
    assert int(step) > 0
    assert figures(outputs) == figures(twin)
