"""Sweeps in real processes: one failure does not stop the rest, and the same command goes on where it stopped."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from qat import sweeps
from qat.cli import arguments, job, main, sweeping
from qat.errors import ConfigError

FOUR = ("-m", "train.lr=4,3", "run.goal=a,fail")


def summary(sweep):
    return json.loads((sweep / "summary.json").read_text())


def statuses(sweep):
    return {job["run_id"]: job["status"] for job in summary(sweep)["jobs"]}


@pytest.fixture
def sweep(here):
    return here / "outputs" / "sweep-001"


@pytest.fixture(scope="module")
def first(launch_alone, tmp_path_factory):
    """A directory in which the sweep `FOUR` ran, and what a person sees of that."""
    folder = tmp_path_factory.mktemp("four")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, launch_alone(*FOUR)


@pytest.fixture
def swept(first, here):
    """A copy of that directory to be in; what a person sees."""
    shutil.copytree(first[0], here, dirs_exist_ok=True)
    return first[1]


def planned(*words):
    """Folders of sweeps, once these words are planned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "check", lambda configs: None)
        patch.setattr(sweeping, "run", lambda sweep, launch: 0)
        assert main.main([*words], lambda: pytest.fail("launched")) == 0
    return sorted(path.parent.name for path in Path().glob("outputs/*/sweep.json"))


def test_failed_jobs_are_told_and_stop_nothing(swept, sweep):
    done = swept
    assert (done.code, done.err) == (1, "error: nothing there\n" * 2)
    assert done.ran == ["SR-001", "SR-002", "SR-003", "SR-004"]
    assert statuses(sweep) == {"SR-003": "complete", "SR-001": "complete", "SR-002": "failed", "SR-004": "failed"}
    assert list(statuses(sweep))[:2] == ["SR-003", "SR-001"]  # best first
    for said in ("SR-002 failed: nothing there", "2 of 4 jobs are left", f"sweep.resume=outputs/{sweep.name}"):
        assert said in done.out
    assert done.heavy == ["numpy"]  # of the plot alone


def test_hydras_own_lines_are_like_those_of_jobs(swept):
    assert "[HYDRA]" not in swept.out and "#0 : " in swept.out


def test_table_and_plot_are_left(swept, sweep):
    text = (sweep / "summary.md").read_text()
    assert "python launch.py -m train.lr=4,3 run.goal=a,fail" in text
    assert "| SR-003 | 3 | a | 3.0000 | complete |" in text
    assert "- SR-002 failed: nothing there" in text
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [FOUR, ["sweep.resume='outputs/sweep-001'"]])
def test_sweep_goes_on_with_what_is_not_complete(swept, launch, here, sweep, words):
    kept = {name: (sweep / name / "result.json").stat().st_mtime_ns for name in ("SR-001", "SR-003")}
    (here / "mended").touch()
    again = launch(*words)
    assert (again.code, again.err, again.ran) == (0, "", ["SR-002", "SR-004"])
    assert set(statuses(sweep).values()) == {"complete"} and len(statuses(sweep)) == 4
    assert {name: (sweep / name / "result.json").stat().st_mtime_ns for name in kept} == kept
    assert [path.name for path in (here / "outputs").glob("sweep-*")] == ["sweep-001"]
    assert not list((here / "outputs").glob("SR-*"))


def test_what_may_change_does(swept, launch, here, sweep):
    (here / "mended").touch()
    words = ("instance=cpu", "instance.micro_batch=2", "tracker=none", "train.save_every=7", "train.keep=1")
    assert launch("sweep.resume=sweep-001", *words).ran == ["SR-002", "SR-004"]
    texts = [(sweep / name / "config_resolved.yaml").read_text() for name in ("SR-001", "SR-002")]
    assert ["micro_batch: 2\n" in text and "device: cpu" in text for text in texts] == [False, True]


def goes_on(*words):
    command = arguments.parse(list(words))
    return main.check_resumed(command, sweeping.resumed(command)).configs[0]


def test_the_outputs_it_was_made_with_are_no_change(launch, here):
    launch("-m", "run.goal=a,stop", "outputs=out")
    for outputs in ("outputs=out", "outputs=out/", "outputs='./out'", f"+outputs={here}/out"):
        assert goes_on(outputs, "sweep.resume=sweep-001/").outputs == "out"
    with pytest.raises(ConfigError, match="outputs=elsewhere would change the sweep in out/sweep-001"):
        goes_on("sweep.resume=out/sweep-001", "outputs=elsewhere")


def test_complete_sweep_typed_again_is_a_new_one(launch, here):
    launch("-m", "train.lr=1,2")
    again = launch("-m", "train.lr=1,2")
    assert again.ran == ["SR-003", "SR-004"]
    assert launch("sweep.resume=outputs/sweep-001").ran == []


def test_only_the_folder_of_a_planned_job_holds_what_is_gone_on_with(swept, here, sweep):
    folders = [sweep / "SR-001", sweep / "SR-002", sweep / "SR-009", here / "outputs" / "SR-005"]
    for folder in folders[2:]:
        folder.mkdir()
        shutil.copy(sweep / "SR-001" / "result.json", folder)
    assert [sweeps.has_job(folder) for folder in folders] == [True, True, False, False]


@pytest.mark.parametrize("rates", ["4,2", "3,4"])
def test_another_sweep_is_another_sweep(swept, rates):
    assert planned(*FOUR) == ["sweep-001"]
    assert planned("-m", f"train.lr={rates}", "run.goal=a,fail") == ["sweep-001", "sweep-002"]


DEATHS = {
    "die": "the process was killed (SIGKILL), as systems do that are out of memory: use a smaller instance.micro",
    "crash": "the process died (SIGSEGV)",
    "vanish": "the process died (exit code 3)",
}


def test_jobs_that_die_are_told_recorded_and_stop_nothing(launch, here, sweep):
    done = launch("-m", f"run.goal={','.join(DEATHS)},a")
    assert done.code == 1 and done.err.count("\n") == len(DEATHS)
    assert done.ran == ["SR-001", "SR-004"]  # the first left its own record before it was killed
    dead = ["SR-001", "SR-002", "SR-003"]
    assert statuses(sweep) == {"SR-004": "complete"} | dict.fromkeys(dead, "failed")
    log = (here / "outputs" / "RUNS.md").read_text()
    for name, line, told in zip(dead, done.err.splitlines(), DEATHS.values(), strict=True):
        result = json.loads((sweep / name / "result.json").read_text())
        assert (result["status"], result["run_id"]) == ("failed", name) and result["error"].startswith(told)
        assert result["command"] == f"python launch.py -m run.goal={','.join(DEATHS)},a"
        assert line.startswith(f"error: {told}") and f"{name} failed: {told}" in done.out and told in log
    (here / "mended").touch()
    assert launch("sweep.resume=outputs/sweep-001").ran == dead


def test_defect_is_told_and_stops_nothing(launch, sweep):
    done = launch("-m", "run.goal=break,a")
    assert (done.code, done.err) == (1, "error: division by zero\n")
    assert statuses(sweep) == {"SR-001": "failed", "SR-002": "complete"}


def test_interrupted_sweep_says_what_is_left_and_goes_on(launch, here, sweep):
    done = launch("-m", "run.goal=a,stop,b")
    assert (done.code, done.err, done.ran) == (130, "interrupted\n", ["SR-001", "SR-002"])
    assert statuses(sweep) == {"SR-001": "complete", "SR-002": "interrupted", "SR-003": "not started"}
    assert "2 of 3 jobs are left; to go on: python launch.py sweep.resume=outputs/sweep-001" in done.out
    (here / "mended").touch()
    assert launch("-m", "run.goal=a,stop,b").ran == ["SR-002", "SR-003"]


@pytest.mark.parametrize("own", [(), ("hydra.sweep.dir=mine",)])
def test_a_job_goes_on_by_its_identity_and_its_sweep_is_told_and_goes_on_from_another_directory(
    launch, here, monkeypatch, own
):
    launch("-m", "run.goal=a,stop,b", *own)
    (here / "mended").touch()
    done = launch("--config-path", "SR-002", "run.resume=SR-002")
    assert (done.code, done.err, done.ran) == (0, "", ["SR-002"])
    folder = here / "mine" if own else here / "outputs" / "sweep-001"
    assert statuses(folder) == {"SR-001": "complete", "SR-002": "complete", "SR-003": "not started"}
    assert not list((here / "outputs").glob("SR-*"))
    assert goes_on(f"sweep.resume={folder.name}").outputs == "outputs"
    (here / "there").mkdir()
    monkeypatch.chdir(here / "there")
    assert launch(f"sweep.resume={folder}").ran == ["SR-003"]
    assert not (here / "there" / "outputs").exists()
    text = (folder / "SR-003" / "config_resolved.yaml").read_text()
    assert f"outputs: {here}/outputs\n" in text


def test_own_folder_goes_on_too(launch, here):
    words = ("-m", "run.goal=a,fail", "hydra.sweep.dir=mine")
    launch(*words)
    (here / "mended").touch()
    assert launch(*words).ran == ["SR-002"]
    other = launch("-m", "train.lr=1,2", "hydra.sweep.dir=mine")
    assert (other.code, other.ran) == (2, []) and "holds another sweep" in other.err


def test_jobs_keep_their_own_configuration(launch, sweep):
    launch("-m", "quant=q2a4,q4a4", "+experiment=quick")
    for name, quant in (("SR-001", "q2a4"), ("SR-002", "q4a4")):
        result = json.loads((sweep / name / "result.json").read_text())
        assert result["quant"] == quant and f"quant={quant}" in result["overrides"]
        assert "goal: quick check" in (sweep / name / "config_resolved.yaml").read_text()


REFUSED = [
    ("sweep.resume=nowhere", "name the folder of a sweep"),
    ("sweep.resume=outputs/sweep-001 train.lr=7", "it goes on as planned"),
    ("sweep.resume=outputs/sweep-001 hydra/launcher=nothing", "nothing"),
    ("-m train.lr=1,1", "configured alike"),
    ("-m instance.micro_batch=1,2", "differ only in instance.micro_batch, which never changes a result"),
    ("sweep.resume=outputs/sweep-001 run.notes=other", "it goes on as planned"),
    ("sweep.resume=outputs/sweep-001 train.eval_every=7", "it goes on as planned"),
    ("-m stage=chat chat.prompt=a,b", "cannot be swept"),
]


@pytest.mark.parametrize(("line", "hint"), REFUSED)
def test_refused_in_one_line(swept, here, capfd, line, hint):
    before = sorted(here.rglob("*"))
    assert main.main(line.split(), lambda: pytest.fail("launched")) in (1, 2)
    told = capfd.readouterr().err
    assert hint in told and told.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_changed_options_end_a_sweep(swept, here, capfd):
    plan = here / "outputs" / "sweep-001" / "sweep.json"
    plan.write_text(plan.read_text().replace("train.lr=4", "train.lr=5"))
    assert main.main(["sweep.resume=outputs/sweep-001"], lambda: pytest.fail("launched")) == 2
    assert "planned with another configuration than SR-001 has now" in capfd.readouterr().err


def test_one_sweep_is_run_by_one_process(swept, launch, here):
    with sweeps.held(sweeps.load(here / "outputs" / "sweep-001")):
        done = launch(*FOUR)
    assert (done.code, done.ran) == (2, [])
    assert "another process is running it" in done.err


def test_damaged_plan_is_told_or_passed_over(swept, here, capfd):
    (here / "outputs" / "sweep-001" / "sweep.json").write_text("{")
    assert main.main(["sweep.resume=outputs/sweep-001"], lambda: pytest.fail("launched")) == 2
    assert "cannot be read as JSON" in capfd.readouterr().err
    assert planned(*FOUR) == ["sweep-001", "sweep-002"]


def test_job_of_a_sweep_is_a_checkpoint(here, compose, checkpoint):
    checkpoint("outputs/sweep-003/SR-012/checkpoints/best")
    config = compose("stage=chat", "checkpoint=SR-012")
    assert config.checkpoint.path == "outputs/sweep-003/SR-012/checkpoints/best"


def test_sigterm_ends_like_an_interrupt(here, capfd):
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)
    assert main.main(["outputs=out"], lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err == "interrupted\n"
    assert sys.argv
