"""Real processes: folders, logs, exit codes, and a recorded run that repeats itself."""

import json
import os
import re

import yaml

from qat.cli import folders, main


def test_single_run_lands_in_its_folder(launch_alone, here):
    done = launch_alone("train.lr=0.5", "outputs=out")
    assert (done.code, done.out, done.err) == (0, "at work\n", "")
    run = here / "out" / "SR-001"
    assert {path.name for path in run.iterdir()} == {
        ".hydra",
        "config_resolved.yaml",
        "result.json",
        "train.log",
    }
    assert re.fullmatch(r"\d{4}-\S+ \S+ INFO at work\n", (run / "train.log").read_text())
    assert json.loads((run / "result.json").read_text())["lr"] == 0.5
    assert done.heavy == []


def test_recorded_run_repeats_itself(launch, here):
    launch("train.lr=0.5", "quant=q4a4", "quant.mlp.rank=7", "run.goal='costs ${5}: a=b'".replace("$", "\\$"))
    again = launch("--config-path", "outputs/SR-001", "--config-name", "config_resolved")
    assert (again.code, again.err) == (0, "")
    first, second = (here / "outputs" / f"SR-00{i}" / "config_resolved.yaml" for i in (1, 2))
    assert first.read_text() == second.read_text()
    changed = launch("--config-path", "outputs/SR-001", "train.lr=1e-2", "quant=q2a2")
    assert changed.code == 0
    result = json.loads((here / "outputs" / "SR-003" / "result.json").read_text())
    assert (result["lr"], result["quant"]) == (0.01, "q2a2")


def test_the_first_student_of_a_recorded_run_is_repeated_and_replaced(launch, here):
    launch("first.quant=q4a4", "first.mode=e2e", "first.quant.mlp.rank=9")
    assert launch("--config-path", "outputs/SR-001").code == 0
    changed = launch("--config-path", "outputs/SR-001", "first.quant=q3a4_r8")
    assert (changed.code, changed.err) == (0, "")
    found = [yaml.safe_load((here / f"outputs/SR-00{i}/config_resolved.yaml").read_text())["first"] for i in (2, 3)]
    assert [first["quant"]["name"] for first in found] == ["q4a4", "q3a4_r8"]
    assert [first["quant"]["mlp"]["rank"] for first in found] == [9, 8]
    assert [first["mode"]["name"] for first in found] == ["e2e", "e2e"]


def test_recorded_run_is_checked_too(launch, here, capfd):
    launch()
    recorded = here / "outputs" / "SR-001" / "config_resolved.yaml"
    recorded.write_text(recorded.read_text().replace("  steps: ", "  stepz: "))
    nothing = lambda: None  # noqa: E731
    assert main.main(["--config-path", "outputs/SR-001"], nothing) == 2
    assert "did you mean train.steps" in capfd.readouterr().err
    assert main.main(["--config-path", "outputs/SR-001", "trian.lr=1"], nothing) == 2


def test_failed_run_is_one_line(launch):
    done = launch("run.goal=fail")
    assert (done.code, done.err) == (1, "error: nothing there\n")


def test_interrupted_run(launch):
    done = launch("run.goal=stop")
    assert (done.code, done.err) == (130, "interrupted\n")


def test_record_says_what_was_typed(launch, here):
    launch("train.lr=5e-1", "run.goal='a b'")
    result = json.loads((here / "outputs" / "SR-001" / "result.json").read_text())
    assert result["command"] == """python launch.py train.lr=5e-1 'run.goal='"'"'a b'"'"''"""
    assert result["overrides"] == ["train.lr=5e-1", "run.goal='a b'"]


def test_chat_leaves_no_run(launch, here):
    assert launch("stage=chat").code == 0
    assert {path.name for path in (here / "outputs").iterdir()} == {"chat"}
    assert {path.name for path in (here / "outputs" / "chat").iterdir()} == {"result.json", "train.log"}


def test_chat_only_reads_where_nothing_can_be_written(compose, here, monkeypatch):
    monkeypatch.setattr(folders, "can_be_written", lambda folder: False)
    place, _ = folders.claim(compose("stage=chat"), None, False)
    assert place.startswith("hydra.run.dir=") and str(here) not in place and list(here.iterdir()) == []


def test_help_answers_fast_and_claims_nothing(launch_alone, here):
    before = os.times()
    done = launch_alone("--help")
    took = os.times()
    seconds = took.children_user + took.children_system - before.children_user - before.children_system
    assert seconds < 5  # of computing: 0.5 where nobody else does
    assert done.code == 0 and done.heavy == []
    for word in ("stage=chat", "q3a4_r8", "train.lr=0.001", "outputs/SR-001", "+experiment"):
        assert word in done.out
    assert list(here.iterdir()) == []


def test_printing_flags_claim_nothing(launch, here):
    assert "steps: 1000" in launch("train.steps=1e3", "--cfg", "job", "--resolve").out
    assert "model.path" not in launch("model=local", "--cfg", "job").err  # may be looked at incomplete
    assert re.match(r"qat-speedrun [\d.]+, Hydra [\d.]+\n", launch("--version").out)
    assert list(here.iterdir()) == []


def test_own_run_folder_is_kept(launch, here):
    assert launch("hydra.run.dir=mine").code == 0
    assert {path.name for path in here.iterdir()} == {"mine"}
