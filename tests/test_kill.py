"""`kill -9` at any moment: nothing half-made that looks finished, an honest record, a next run that goes through."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from qat.artifacts import open_artifact

# Rising so slowly that every look finds a better student: it saves all the time.
FOREVER = ["train.steps=100000", "train.eval_every=1", "train.warmup=0.9", "train.lr=30", "instance.precision=fp32"]


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything already: forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch", "qat.stages.run", "qat.plots"])
    return context


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("kill") / "outputs"


class Job:
    """One launch of the tiny job in a process of its own."""

    def __init__(self, processes, outputs, *argv):
        import launch
        from qat.cli import main

        self.outputs, self.before = outputs, set(outputs.glob("SR-*"))
        words = ["+debug=tiny", "quant=q2a16", "data.documents=64", f"outputs={outputs}", *argv]
        self.process = processes.Process(target=main.main, args=(words, launch.launch))
        self.process.start()

    @property
    def folder(self):
        return next(iter(set(self.outputs.glob("SR-*")) - self.before), None)

    def kill_once(self, there, seconds=0.0):
        """Kills the process so long after something is there."""
        end = time.monotonic() + 60
        while not there(self):
            assert self.process.is_alive() and time.monotonic() < end, "it ended before it could be killed"
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL

    def finish(self):
        self.process.join(60)
        assert self.process.exitcode == 0


def half_made(kind):
    """An artifact of this kind is in the making."""
    return lambda job: list((job.outputs / "artifacts" / kind).glob(".*.partial"))


def saving_after(steps):
    """Training has done some steps and is about to replace its best checkpoint."""

    def there(job):
        path = job.folder and job.folder / "metrics.jsonl"
        done = path and path.is_file() and path.read_text().count('"loss"') >= steps
        return done and list(job.folder.glob("checkpoints/.best.*"))

    return there


def check_all_is_whole(outputs):
    """Every folder under its final name is complete; returns how many there are of each kind."""
    artifacts = [path for path in outputs.glob("artifacts/*/*") if path.is_dir() and not path.name.startswith(".")]
    checkpoints = [path for path in outputs.glob("SR-*/checkpoints/*") if not path.name.startswith(".")]
    for folder in artifacts + checkpoints:
        open_artifact(folder)
    return sorted(folder.parent.name for folder in artifacts)


def check_interrupted(folder):
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["run_id"], result["error"]) == ("interrupted", folder.name, None)


def check_complete(folder):
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["error"]) == ("complete", None)
    for name in ("best", "last"):
        open_artifact(folder / "checkpoints" / name)


def test_job_killed_in_every_stage_leaves_only_whole_artifacts_and_the_next_goes_on(processes, outputs):
    made = []
    for kind in ("models", "documents", "caches", "checkpoints"):
        job = Job(processes, outputs)
        job.kill_once(half_made(kind))
        assert check_all_is_whole(outputs) == sorted(made)
        check_interrupted(job.folder)
        made.append(kind)
    last = Job(processes, outputs)
    last.finish()
    assert check_all_is_whole(outputs) == sorted(made)
    check_complete(last.folder)
    assert list(outputs.glob("artifacts/*/.*.partial")) == []


def test_training_killed_while_it_saves_leaves_valid_checkpoints_or_none(processes, outputs):
    for number in range(4):
        job = Job(processes, outputs, *FOREVER)
        job.kill_once(saving_after(number), seconds=0.002 * number)
        check_all_is_whole(outputs)
        check_interrupted(job.folder)
        rows = (job.folder / "metrics.jsonl").read_text().split("\n")
        assert all(json.loads(row) for row in rows[:-1])
