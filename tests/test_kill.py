"""`kill -9` at any moment: nothing half-made that looks finished, an honest record, a next run that goes through."""

import json
import signal
import time

import pytest

from qat.artifacts import open_artifact
from tests.launching import Launch

# Rising so slowly that every look finds a better student: it saves all the time.
FOREVER = ["train.steps=100000", "train.eval_every=1", "train.warmup=0.9", "train.lr=30", "instance.precision=fp32"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("kill") / "outputs"


class Job(Launch):
    """One launch of the tiny job."""

    def __init__(self, outputs, *words):
        self.before = set(outputs.glob("SR-*"))
        super().__init__(outputs, "+debug=tiny", "quant=q2a16", "data.documents=64", *words)

    @property
    def folder(self):
        return next(iter(set(self.outputs.glob("SR-*")) - self.before), None)

    def kill_once(self, there, seconds=0.0):
        """Kills the process so long after something is there."""
        self.wait_for(lambda: there(self))
        time.sleep(seconds)
        self.send(signal.SIGKILL)
        assert self.ended()[0] == -signal.SIGKILL


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


def test_job_killed_in_every_stage_leaves_only_whole_artifacts_and_the_next_goes_on(outputs):
    made = []
    for kind in ("models", "documents", "caches", "checkpoints"):
        job = Job(outputs)
        job.kill_once(half_made(kind))
        assert check_all_is_whole(outputs) == sorted(made)
        check_interrupted(job.folder)
        made.append(kind)
    last = Job(outputs)
    assert last.ended()[0] == 0
    assert check_all_is_whole(outputs) == sorted(made)
    check_complete(last.folder)
    assert list(outputs.glob("artifacts/*/.*.partial")) == []


def test_training_killed_while_it_saves_leaves_valid_checkpoints_or_none(outputs):
    for number in range(4):
        job = Job(outputs, "data=prompts", *FOREVER)
        job.kill_once(saving_after(number), seconds=0.002 * number)
        check_all_is_whole(outputs)
        check_interrupted(job.folder)
        rows = (job.folder / "metrics.jsonl").read_text().split("\n")
        assert all(json.loads(row) for row in rows[:-1])
