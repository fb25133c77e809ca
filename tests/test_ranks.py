"""Real processes under torchrun and under `instance.devices`: one result, and one voice when something fails."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qat.artifacts import MANIFEST
from qat.cli import main, ranks
from qat.errors import RankError
from qat.processes import environment
from tests.launching import LAUNCH, Python, fork_pythons

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ("+debug=tiny", "instance.precision=fp32", "data=prompts", "train.batch_size=5", "mode=e2e")
LONG = (*TINY, "train.steps=100000", "train.eval_every=50000", "train.save_every=4")
STEPS = 16  # of a run that is killed in its first half
OURS = ("error: ", "interrupted", "this is a defect", "Traceback")


def start(outputs, *words, together="torchrun", afresh=False):
    """A launch in two processes; where they start afresh, those of torchrun are interpreters of their own."""
    before = None if afresh else fork_pythons
    first, after = {"torchrun": (TORCHRUN, []), "devices": ([], ["instance.devices=2"]), "alone": ([], [])}[together]
    return Python(*first, LAUNCH, *words, *after, f"outputs={outputs}", before=before)


def ended(process) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and of standard error what is said before torchrun's own account of it."""
    code, out, err = process.ended(300)
    lines = err.split("torch/distributed/elastic/multiprocessing/api.py:1002] failed")[0].splitlines()
    return code, out, [line for line in lines if line.startswith(OURS)]


def record(outputs, run="SR-001") -> dict:
    return json.loads((outputs / run / "result.json").read_text())


def rows(outputs, run="SR-001") -> list[dict]:
    return [json.loads(line) for line in (outputs / run / "metrics.jsonl").read_text().splitlines()]


def next_run(outputs) -> str:
    """The identity of the run that comes next."""
    return f"SR-{len(list(outputs.glob('SR-*'))) + 1:03d}"


def hashes(outputs, kind) -> dict[str, str]:
    """SHA-256 of every file of the artifacts of a kind, but for what says when and where each was made."""
    files = [path for path in (outputs / "artifacts" / kind).glob("[!.]*/*") if path.is_file()]
    files = [path for path in files if path.name != MANIFEST]
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_steps(process, outputs, run="SR-001", count=5):
    path = outputs / run / "metrics.jsonl"
    process.wait_for(lambda: path.exists() and path.read_text().count("\n") > count)


def ranks_of(process) -> list[int]:
    """Process numbers by rank, in which they were started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    return sorted(map(int, children))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outputs of one process."""
    outputs = tmp_path_factory.mktemp("alone") / "outputs"
    code, _, said = ended(start(outputs, *TINY, "train.steps=6", "train.eval_every=3", together="alone"))
    assert (code, said) == (0, [])
    return outputs


def test_a_whole_job_under_torchrun_is_that_of_one_process(alone, tmp_path):
    outputs = tmp_path / "outputs"
    words = (*TINY, "train.steps=6", "train.eval_every=3", "tracker=wandb")
    code, out, said = ended(start(outputs, *words))
    assert (code, said) == (0, [])
    assert out.count("SR-001  v2_q2a4") == 1 and "layers converted" in out  # one voice
    for kind in ("models", "documents", "caches"):
        assert hashes(outputs, kind) == hashes(alone, kind)
    assert sum(name.endswith(".safetensors") for name in hashes(outputs, "caches")) == 3  # both had a shard to write
    for ours, theirs in zip(rows(outputs), rows(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = record(outputs)["metrics"], record(alone)["metrics"]
    assert ours == pytest.approx(theirs, rel=1e-3) and record(outputs)["status"] == "complete"
    assert len(list(outputs.glob("SR-001/wandb/offline-run-*"))) == 1  # the first process alone tells wandb
    assert [path.name for path in outputs.glob("SR-*")] == ["SR-001"]


@pytest.mark.parametrize("together", ["torchrun", "devices"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train.stepz=3",), "error: unknown key train.stepz (did you mean train.steps?)"),
        (("model=local", "model.path=nowhere", "stage=cache"), "error: nowhere holds no config.json"),
        (("train.batch_size=1",), "error: train.batch_size=1: fewer sequences than"),
    ],
)
def test_what_all_processes_find_wrong_is_told_once(tmp_path, together, words, says):
    code, _, said = ended(start(tmp_path / "outputs", *TINY, *words, together=together))
    assert code > 0 and len(said) == 1 and said[0].startswith(says)


def test_torchrun_starts_interpreters_of_their_own(tmp_path):
    code, _, said = ended(start(tmp_path / "outputs", *TINY, "stage=doctr", afresh=True))
    assert code > 0 and len(said) == 1 and said[0].startswith("error: stage=doctr")


def test_a_killed_process_ends_all_in_a_sentence_and_the_run_goes_on(alone):
    """Under torchrun; tests/distill/test_resume.py has the same of `instance.devices`, to the same bits."""
    run, words = next_run(alone), (*LONG, f"train.steps={STEPS}")
    process = start(alone, *words)
    wait_for_steps(process, alone, run)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, _, said = ended(process)
    assert code > 0
    (told,) = said
    assert told.startswith("error: another of the 2 processes that train together has ended")
    assert record(alone, run)["status"] == "failed" and "run.resume" in record(alone, run)["error"]
    code, _, said = ended(start(alone, *words, f"run.resume={run}"))
    assert (code, said) == (0, []) and record(alone, run)["status"] == "complete"
    assert [row["step"] for row in rows(alone, run) if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("together", ["torchrun", "devices"])
def test_processes_whose_launcher_is_killed_end_by_themselves(alone, together):
    run = next_run(alone)
    process = start(alone, *LONG, together=together)
    wait_for_steps(process, alone, run)
    left = ranks_of(process)
    process.send(signal.SIGKILL)
    end = time.monotonic() + 60
    while any(map(is_there, left)):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert record(alone, run)["status"] == "interrupted"
    last = max(row["step"] for row in rows(alone, run))
    assert (alone / run / "checkpoints" / f"state-{last:08d}").exists()


def is_there(process: int) -> bool:
    """Whether a process runs, and has not merely not been waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_other_does_not_say_that_it_was_interrupted(killed, capfd, tmp_path, monkeypatch):
    """The launcher ends the other one, which may not have noticed by then that anything is amiss."""
    ready = "import pathlib, signal, sys, time; from qat.cli import main; "
    waits = "def stay(): pathlib.Path(sys.argv[1]).touch(); time.sleep(60)\n"
    ends = "main._main = lambda *_: stay(); sys.exit(main.main([], None))"
    processes = []
    for rank in range(2):
        told = environment(rank, 2, "1") | {"PYTHONPATH": str(Path(__file__).parents[1])}
        code = f"{ready}\n{waits}{ends}"
        processes.append(subprocess.Popen([sys.executable, "-c", code, str(tmp_path / str(rank))], env=told))
    monkeypatch.setattr(ranks, "_start", lambda argv, index, count, port: processes[index])

    def kill():
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            time.sleep(0.05)
        processes[killed].kill()

    threading.Thread(target=kill).start()
    assert ranks.launch([], 2) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == f"error: process {killed} of 2 was killed\n"


@pytest.mark.parametrize("together", ["torchrun", "devices"])
def test_a_signal_to_the_one_that_started_them_saves_first(alone, together):
    run = next_run(alone)
    process = start(alone, *LONG, together=together)
    wait_for_steps(process, alone, run)
    process.send(signal.SIGTERM)
    code, _, said = ended(process)
    assert code > 0 and said[:1] == ["interrupted"]
    assert record(alone, run)["status"] == "interrupted"
    last = max(row["step"] for row in rows(alone, run))
    assert (alone / run / "checkpoints" / f"state-{last:08d}").exists()


def test_a_later_process_that_is_killed_ends_an_earlier_one_that_waits_for_it():
    """As where NCCL waits for the other process: nothing there fails by itself."""
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    processes[1].kill()
    began = time.monotonic()
    assert ranks._wait(processes) == 1
    assert time.monotonic() - began < 30 and processes[0].returncode == -signal.SIGTERM


def test_the_cause_is_told_although_torchrun_ends_whoever_is_left():
    with pytest.raises(RankError), main._told_by_sigterm():
        try:
            raise RankError("another of the 2 processes that train together has ended")
        finally:
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(main.Terminated), main._told_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
