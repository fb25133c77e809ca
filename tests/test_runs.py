"""Run identity, names, and `result.json` from a run's first moment to its last."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat import identities, records, runs
from qat.artifacts import Artifact
from qat.config import Config, ModeConfig, QuantConfig, RunConfig, Stage, TrackerConfig, TrackerKind
from qat.identities import claim_run, claim_sweep
from qat.runs import Run, checkpoint_name, environment

ROOT = Path(__file__).resolve().parents[1]

CLAIMER = """
import pathlib, sys, time
from qat.identities import claim_run
root = pathlib.Path(sys.argv[1])
(root / f"ready-{sys.argv[2]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
print(*(claim_run(root / "outputs") for _ in range(20)))
"""


@pytest.fixture
def config(tmp_path):
    return Config(
        stage=Stage.run,
        outputs=str(tmp_path / "outputs"),
        quant=QuantConfig(name="q2a4"),
        mode=ModeConfig(name="mlp", mlp=True, attn=False),
        tracker=TrackerConfig(name="none", kind=TrackerKind.none),
        run=RunConfig(goal="see", notes="twice"),
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "outputs" / "SR-007"
    path.mkdir(parents=True)
    return path


def result_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


def test_runs_are_numbered_from_one(tmp_path):
    assert [claim_run(tmp_path) for _ in range(3)] == ["SR-001", "SR-002", "SR-003"]


def test_number_taken_since_the_look_around_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert [claim_run(tmp_path) for _ in range(3)] == ["SR-001", "SR-002", "SR-003"]


def test_deleted_run_frees_no_number(tmp_path):
    (tmp_path / claim_run(tmp_path)).mkdir()
    (tmp_path / "SR-001").rmdir()
    assert claim_run(tmp_path) == "SR-002"


def test_numbers_go_on_beyond_three_digits(tmp_path):
    (tmp_path / ".ids" / "SR-999").mkdir(parents=True)
    assert claim_run(tmp_path) == "SR-1000"
    assert claim_run(tmp_path) == "SR-1001"


def test_foreign_names_are_no_numbers(tmp_path):
    (tmp_path / ".ids" / "SR-x").mkdir(parents=True)
    assert claim_run(tmp_path) == "SR-001"


def test_sweeps_are_numbered_from_one_and_empty(tmp_path):
    folders = [claim_sweep(tmp_path) for _ in range(2)]
    assert [folder.name for folder in folders] == ["sweep-001", "sweep-002"]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_eight_processes_at_once_claim_different_runs(tmp_path):
    command = [sys.executable, "-c", CLAIMER, str(tmp_path)]
    started = [subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for i in range(8)]
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("ready-*"))) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    claimed = [name for process in started for name in process.communicate(timeout=30)[0].split()]
    assert sorted(claimed) == [f"SR-{number:03d}" for number in range(1, 161)]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (0.5849, "v2_q2a4_mlp_0.58_fp32"),
        (12.0, "v2_q2a4_mlp_12.00_fp32"),
        (None, "v2_q2a4_mlp_none_fp32"),
        (math.nan, "v2_q2a4_mlp_none_fp32"),
        (math.inf, "v2_q2a4_mlp_none_fp32"),
    ],
)
def test_checkpoint_is_named_by_architecture_quant_variant_loss_and_type(loss, name):
    assert checkpoint_name("q2a4", "mlp", loss) == name


def test_record_is_there_at_once_and_says_interrupted(config, folder):
    Run(config, folder)
    result = result_of(folder)
    assert (result["status"], result["error"], result["run_id"]) == ("interrupted", None, "SR-007")
    assert (result["schema"], result["stage"]) == (1, "run")
    assert (result["goal"], result["notes"]) == ("see", "twice")
    assert result["paths"] == {"run": str(folder)}
    assert (folder / "metrics.jsonl").read_text() == ""


def test_job_of_a_sweep_claims_a_run_of_its_own(config, tmp_path):
    claim_run(Path(config.outputs))
    (tmp_path / "0").mkdir()
    Run(config, tmp_path / "0")
    assert result_of(tmp_path / "0")["run_id"] == "SR-002"


def test_a_folder_of_its_own_is_noted_and_keeps_its_identity_when_gone_on_with(config, tmp_path):
    own, outputs = tmp_path / "mine", Path(config.outputs)
    own.mkdir()
    Run(config, own)
    assert list(identities.places(outputs)) == [("SR-001", own)]
    config.run.resume = "SR-001"
    Run(config, own)
    assert result_of(own)["run_id"] == "SR-001"
    config.run.resume = None
    Run(config, own)  # another run in the same folder
    assert list(identities.places(outputs)) == [("SR-002", own)]


def test_a_folder_in_outputs_needs_no_note(config, folder, monkeypatch):
    Run(config, folder)
    monkeypatch.setenv("RANK", "1")  # a process beside the first, in a scratch folder
    (folder.parent.parent / "SR-000").mkdir()
    Run(config, folder.parent.parent / "SR-000")
    assert list(identities.places(folder.parent)) == [("SR-007", folder)]


@pytest.mark.parametrize(
    ("status", "error"), [("complete", None), ("failed", "no such thing"), ("interrupted", "stopped")]
)
def test_finished_record_says_how(config, folder, status, error):
    run = Run(config, folder)
    run.result["metrics"]["kl"] = 0.5
    run.finish(status, error)
    result = result_of(folder)
    assert (result["status"], result["error"], result["metrics"]) == (status, error, {"kl": 0.5})


def test_total_time_is_that_since_the_start(config, folder, clock):
    run = Run(config, folder)
    clock.now += 2.5
    run.save()
    assert result_of(folder)["timing"]["total_s"] == 2.5
    clock.now += 4.75
    run.finish("complete")
    assert result_of(folder)["timing"]["total_s"] == 7.25


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is told to go on."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def strftime(self, form):
            return f"at {self.now}"

    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    return clock


def test_what_goes_on_stays_what_it_was_and_adds_up_its_time(config, folder, clock):
    run = Run(config, folder, "python launch.py seed=1", ["seed=1", "run.goal=see"])
    with run.timed("convert"):
        clock.now += 5
    with pytest.raises(KeyboardInterrupt), run.timed("distill"):
        clock.now += 20
        raise KeyboardInterrupt
    run.result["memory"]["peak_bytes"] = 7
    run.finish("interrupted", "stopped")
    started, clock.now = run.result["started"], 1000.0
    plain = Config(**vars(config) | {"run": RunConfig(notes="another")})
    again = Run(plain, folder, "python launch.py run.resume=SR-007", ["run.notes=another"], goes_on=True)
    with again.timed("convert"):
        clock.now += 0.5
    with again.timed("distill"):
        clock.now += 2
    again.finish("complete")
    result = result_of(folder)
    assert (result["status"], result["error"], result["started"]) == ("complete", None, started)
    assert (result["command"], result["overrides"]) == ("python launch.py seed=1", ["seed=1", "run.goal=see"])
    assert (result["goal"], result["notes"]) == ("see", "another")  # a word that was typed anew is taken
    assert result["timing"] == {"total_s": 27.5, "convert_s": 5.5, "distill_s": 22.0}
    assert result["memory"] == {"peak_bytes": 7}
    assert result["resumed"] == [{"started": "at 1000.0", "command": "python launch.py run.resume=SR-007"}]


def test_a_run_that_is_killed_while_it_trains_knows_how_long_it_took(config, folder, clock):
    run = Run(config, folder)
    with run.timed("distill"):
        for step in range(100):
            clock.now += 1
            run.log({"step": step, "loss": 1.0})
        assert result_of(folder)["timing"]["distill_s"] >= 90
    clock.now = 0.0
    again = Run(config, folder, goes_on=True)
    clock.now += 1
    again.save()
    assert result_of(folder)["timing"]["total_s"] == result_of(folder)["timing"]["distill_s"] + 1 >= 91


def test_stages_of_one_kind_add_up(config, folder, clock):
    run = Run(config, folder)
    for seconds in (3, 4):
        with run.timed("convert"):
            clock.now += seconds
    run.save()
    assert result_of(folder)["timing"] == {"convert_s": 7.0, "total_s": 7.0}


@pytest.mark.parametrize("stage", list(Stage))
def test_only_what_trains_is_called_like_what_was_trained(config, folder, stage):
    config.stage = stage
    Run(config, folder)
    trained = stage in (Stage.run, Stage.distill)
    assert result_of(folder)["name"] == ("v2_q2a4_mlp_none_fp32" if trained else "")


def test_a_run_that_is_withdrawn_was_none(config, folder):
    (Path(config.outputs) / ".ids" / "SR-007").mkdir(parents=True)
    run = Run(config, folder)
    assert not run.begun
    run.withdraw()
    assert list(folder.iterdir()) == [] and not (Path(config.outputs) / ".ids").exists()


def test_withdrawing_brings_back_the_record_that_was_there(config, tmp_path):
    (own := tmp_path / "mine").mkdir()
    first = Run(config, own)
    first.log({"step": 1, "loss": 2.0})
    first.finish("complete")
    record, figures = (own / "result.json").read_text(), (own / "metrics.jsonl").read_text()
    Run(config, own).withdraw()
    assert (own / "result.json").read_text() == record and (own / "metrics.jsonl").read_text() == figures
    assert [path.name for path in (Path(config.outputs) / ".ids").iterdir()] == ["SR-001"]


def artifact(folder, fresh):
    return Artifact(folder, {"made": {"at": "2026-11-28T14:03:59+0000", "seconds": 138, "cores": 2}}, fresh)


def test_what_a_run_made_itself_is_not_reused_when_it_goes_on(config, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run = Run(config, folder)
    run.uses("cache", artifact(tmp_path / "a", False))
    run.uses("convert", artifact(tmp_path / "b", True))
    assert run.begun and run.result["made"] == ["b"] and run.result["reused"].keys() == {"cache"}
    assert "cache reused, made 2026-11-28 14:03 in 2 min 18 s on 2 cores: " in caplog.text
    run.finish("interrupted")
    again = Run(config, folder, goes_on=True)
    again.uses("convert", artifact(tmp_path / "b", False))
    assert again.result["made"] == ["b"] and again.result["reused"].keys() == {"cache"}


def test_what_was_made_before_that_was_recorded_says_so(config, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run = Run(config, folder)
    run.uses("convert", Artifact(tmp_path / "old", {}))
    assert run.result["reused"]["convert"]["made"] is None and not run.begun
    assert "convert reused, made before that was recorded" in caplog.text


def test_figures_that_are_not_finite_become_null_everywhere(config, folder):
    run = Run(config, folder)
    run.result["metrics"] = {"kl": math.nan, "list": [1.0, -math.inf, {"deep": math.inf}], "fine": 2}
    run.log({"step": 1, "loss": math.nan, "lr": 0.1})
    run.finish("failed", "it was NaN")
    assert result_of(folder)["metrics"] == {"kl": None, "list": [1.0, None, {"deep": None}], "fine": 2}
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 0.1}\n'


def test_metrics_are_one_line_a_row_and_there_before_the_run_ends(config, folder):
    run = Run(config, folder)
    rows = [{"step": 0, "kd_loss": 1.5}, {"step": 1, "loss": 0.25}]
    for row in rows:
        run.log(row)
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows


def test_tracker_hears_every_row_and_the_end(config, folder, monkeypatch):
    heard = []

    class Listener:
        def log(self, row):
            heard.append(row)

        def finish(self, summary, failed):
            heard.append((summary, failed))

    monkeypatch.setattr(runs, "open_tracker", lambda config, folder, run_id: heard.append(run_id) or Listener())
    run = Run(config, folder)
    run.log({"step": 1, "loss": 2.0})
    run.result["metrics"] = {"kl": math.nan}
    run.finish("failed", "why")
    assert heard == ["SR-007", {"step": 1, "loss": 2.0}, ({"kl": None}, True)]


def test_environment_names_commit_versions_and_device():
    import torch

    said = environment("cpu, float32")
    assert said["device"] == "cpu, float32"
    assert said["torch"] == torch.__version__
    assert said["git"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|.+-g[0-9a-f]+(-dirty)?", said["git"])
    json.dumps(said)


def test_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment("cpu")["git"] is None


def test_the_newest_run_alike_says_how_long_parts_take(config, tmp_path, monkeypatch):
    def ran(name, device, rate, status="complete"):
        monkeypatch.setattr(runs.console, "paces", runs.console.Paces())
        runs.console.paces.begin({"distillation": 9.0, "teacher outputs": 5.0})
        runs.console.paces.now["distillation"] = rate
        (tmp_path / name).mkdir()
        run = Run(config, tmp_path / name)
        run.result["environment"] = {"device": device, "cores": 2}
        run.finish(status)
        return run.result

    ran("SR-001", "cpu", 1.0), ran("SR-002", "cpu", 2.0), ran("SR-003", "cpu", 3.0, "failed")
    own = ran("SR-004", "gpu", 4.0, "interrupted") | {"environment": {"device": "cpu", "cores": 2}}
    found = records.last_like(tmp_path, own)
    assert (found.run_id, found.numbers("rates")) == ("SR-002", {"distillation": 2.0, "teacher outputs": 5.0})
    assert records.last_like(tmp_path, own | {"environment": {"device": "cpu", "cores": 4}}) is None
    (tmp_path / "SR-002" / "result.json").write_text("{")
    assert records.last_like(tmp_path, own).run_id == "SR-001"
