"""Real processes under torchrun and under `instance.devices`: one result, and one voice when something fails."""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qat.artifacts import MANIFEST
from qat.cache import writer
from qat.cli import main, ranks
from qat.errors import RankError
from tests.launching import LAUNCH, Python, fork_pythons

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ("data=prompts", "data.documents=64", "train.batch_size=5", "evaluate.sample_tokens=1")
TINY = ("+debug=tiny", "instance.precision=fp32", "mode=e2e", *SMALL)
LONG = (*TINY, "train.steps=100000", "train.eval_every=50000", "train.save_every=4")
OURS = ("error: ", "interrupted", "this is a defect", "Traceback")


def forked() -> None:
    """Has processes forked, and caches have several shards."""
    fork_pythons()
    writer.SHARD_ROWS = 64


def start(outputs, *words, together="torchrun", afresh=False):
    """A launch in two processes; where they start afresh, those of torchrun are interpreters of their own."""
    before = None if afresh else forked
    first, after = {"torchrun": (TORCHRUN, []), "devices": ([], ["instance.devices=2"]), "alone": ([], [])}[together]
    return Python(*first, LAUNCH, *words, *after, f"outputs={outputs}", before=before)


def ended(process) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and of standard error what is said before torchrun's own account of it."""
    code, out, err = process.ended(300)
    print(err)  # seen where a test fails
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
    assert sum(name.endswith(".safetensors") for name in hashes(outputs, "caches")) > 2  # both had a shard to write
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


def test_a_killed_process_ends_all_in_a_sentence_and_the_run_goes_on_until_a_signal_saves_it(alone):
    """Under torchrun; tests/distill/test_resume.py has the first of `instance.devices`, to the same bits."""
    run = next_run(alone)
    process = start(alone, *LONG)
    wait_for_steps(process, alone, run)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, _, said = ended(process)
    assert code > 0
    (told,) = said
    assert told.startswith("error: another of the 2 processes that train together has ended")
    assert record(alone, run)["status"] == "failed" and "run.resume" in record(alone, run)["error"]
    saved = newest_state(alone, run)
    assert saved >= 4
    process = start(alone, *LONG, f"run.resume={run}")
    process.wait_for(lambda: newest_state(alone, run) > saved)
    process.send(signal.SIGTERM)
    is_interrupted(alone, run, process)
    assert steps(alone, run) == list(range(1, newest_state(alone, run) + 1))


def test_a_signal_to_the_one_that_started_them_saves_first(alone):
    """As above under torchrun."""
    run = next_run(alone)
    process = start(alone, *LONG, together="devices")
    wait_for_steps(process, alone, run)
    process.send(signal.SIGTERM)
    is_interrupted(alone, run, process)


def is_interrupted(outputs, run, process):
    """Whether all processes end and say so once, and the run's last step is saved."""
    code, _, said = ended(process)
    assert code > 0 and said[:1] == ["interrupted"]
    assert record(outputs, run)["status"] == "interrupted"
    assert newest_state(outputs, run) == max(row["step"] for row in rows(outputs, run))


def newest_state(outputs, run) -> int:
    """The last step that is saved."""
    return max(int(path.name[-8:]) for path in (outputs / run / "checkpoints").glob("state-*"))


def steps(outputs, run) -> list[int]:
    """The steps that are told of."""
    return [row["step"] for row in rows(outputs, run) if "loss" in row]


def test_processes_whose_launcher_is_killed_end_by_themselves(alone):
    run = next_run(alone)
    process = start(alone, *LONG, together="devices")
    wait_for_steps(process, alone, run)
    left = ranks_of(process)
    process.send(signal.SIGKILL)
    end = time.monotonic() + 60
    while any(map(is_there, left)):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert record(alone, run)["status"] == "interrupted"
    assert newest_state(alone, run) == max(row["step"] for row in rows(alone, run))


ENDS_AFTER_ITS_PARENT = """
import os, pathlib, signal, sys, time
from qat.cli import ranks
ready, ended = map(pathlib.Path, sys.argv[1:])
if not os.fork():
    os.environ.update(RANK="0", WORLD_SIZE="2")
    signal.signal(signal.SIGTERM, lambda *_: (ended.touch(), os._exit(0)))
    ranks.outlive_nobody()
    ready.touch()
time.sleep(60)
"""


def test_a_process_of_torchrun_ends_by_sigterm_once_torchrun_is_gone(tmp_path):
    """It is told of nobody that started it; what SIGTERM does is above."""
    ready, gone = tmp_path / "ready", tmp_path / "ended"
    process = Python("-c", ENDS_AFTER_ITS_PARENT, str(ready), str(gone))
    process.wait_for(ready.exists)
    assert not gone.exists()
    process.send(signal.SIGKILL)
    end = time.monotonic() + 30
    while not gone.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_there(process: int) -> bool:
    """Whether a process runs, and has not merely not been waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ONE_OF_TWO_IS_KILLED = """
import pathlib, subprocess, sys, threading, time
from qat.cli import ranks
from qat.processes import environment
killed, ready = int(sys.argv[1]), [pathlib.Path(sys.argv[2], str(rank)) for rank in range(2)]
stays = "import pathlib, sys, time; from qat.cli import main\\n"
stays += "def stay(): pathlib.Path(sys.argv[1]).touch(); time.sleep(60)\\n"
stays += "main._main = lambda *_: stay(); sys.exit(main.main([], None))"

def started(argv, rank, count, port):
    words = [sys.executable, "-c", stays, str(ready[rank])]
    processes.append(subprocess.Popen(words, env=environment(rank, 2, port)))
    return processes[-1]

def kill():
    while not all(path.exists() for path in ready):
        time.sleep(0.05)
    processes[killed].kill()

processes, ranks._start = [], started
threading.Thread(target=kill).start()
sys.exit(ranks.launch([], 2))
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_other_does_not_say_that_it_was_interrupted(killed, tmp_path):
    """The launcher ends the other one, which may not have noticed by then that anything is amiss."""
    process = Python("-c", ONE_OF_TWO_IS_KILLED, str(killed), str(tmp_path), before=fork_pythons)
    code, _, said = process.ended(60)
    assert (code, said) == (128 + signal.SIGKILL, f"error: process {killed} of 2 was killed\n")


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
