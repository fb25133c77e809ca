"""What the jobs of a sweep come to: ranked by what they were to lower, among those that compare."""

import json

import pytest

from qat import sweeps
from qat.sweeps import Job, Sweep


@pytest.fixture
def sweep(tmp_path):
    """Makes a sweep of complete jobs from their overrides, figures and texts."""

    def make(*jobs):
        planned = []
        for number, (overrides, metrics, text) in enumerate(jobs, start=1):
            run_id = f"SR-{number:03d}"
            (tmp_path / run_id).mkdir()
            ground = {"teacher": {"name": "tiny", "fingerprint": "f"}, "text": text, "called": text}
            result = {"run_id": run_id, "status": "complete", "metrics": metrics, "measured_on": ground}
            (tmp_path / run_id / "result.json").write_text(json.dumps(result))
            planned.append(Job(run_id, overrides, run_id))
        return Sweep(tmp_path, "python launch.py -m", {}, planned)

    return make


def order(summary):
    return [job["run_id"] for job in summary["jobs"]]


def test_jobs_on_one_text_are_ranked(sweep):
    summary = sweeps.summarize(sweep((["seed=1"], {"kl": 2.0}, "a"), (["seed=2"], {"kl": 1.0}, "a")))
    assert order(summary) == ["SR-002", "SR-001"] and sweeps.remark(summary) == ""
    assert sweeps.cells(summary)[0] == ["run", "seed", "full KL"]
    summary["jobs"][1]["status"] = "failed"  # then each says how it ended
    assert [row[-1] for row in sweeps.cells(summary)[1]] == ["complete", "failed"]


def test_jobs_on_different_texts_are_ranked_apart_and_told_so(sweep, tmp_path):
    jobs = [
        (["data=text", "train.lr=1"], {"kl": 2.0}, "a"),
        (["data=prompts", "train.lr=1"], {"kl": 0.5}, "b"),
        (["data=text", "train.lr=2"], {"kl": 1.0}, "a"),
    ]
    summary = sweeps.summarize(sweep(*jobs))
    assert order(summary) == ["SR-003", "SR-001", "SR-002"]
    header, rows = sweeps.cells(summary)
    assert header == ["run", "data", "train.lr", "held-out text", "full KL"]
    assert [row[3] for row in rows] == ["f a", "f a", "f b"]
    told = "These jobs were measured on 2 different teachers or texts: figures compare only within one."
    assert sweeps.remark(summary) == told and told in (tmp_path / "summary.md").read_text()


def test_an_option_that_is_added_to_a_recorded_run_is_a_column_of_its_group(sweep):
    jobs = [([f"+quant={name}", "+schema@x=y"], {"kl": 1.0}, "a") for name in ("q2a4", "q4a4")]
    assert sweeps.cells(sweeps.summarize(sweep(*jobs)))[0] == ["run", "quant", "full KL"]


def test_a_line_joins_no_jobs_on_different_texts(sweep, monkeypatch):
    drawn = []
    monkeypatch.setattr("qat.plots.sweep", lambda points, *_: drawn.extend(points))
    sizes = [(["data.documents=64"], {"kl": 2.0}, "a"), (["data.documents=128"], {"kl": 1.0}, "b")]
    sweeps.summarize(sweep(*sizes))
    assert {values["held-out text"] for values, _ in drawn} == {"f a", "f b"}


def test_training_alone_is_ranked_by_the_loss_that_is_trained_where_that_is_one(sweep):
    one = {"loss_best": 1.0, "kd_loss_best": 4.0, "kd_loss_final": 4.0}
    other = {"loss_best": 2.0, "kd_loss_best": 3.0, "kd_loss_final": 3.0}
    assert order(sweeps.summarize(sweep((["train.lr=1"], one, "a"), (["train.lr=2"], other, "a")))) == [
        "SR-001",
        "SR-002",
    ]


def test_training_with_different_losses_is_ranked_by_the_one_that_all_have(sweep):
    one = {"loss_best": 1.0, "kd_loss_best": 4.0}
    other = {"loss_best": 2.0, "kd_loss_best": 3.0}
    jobs = (["loss=topk_kl"], one, "a"), (["loss=full_kl"], other, "a")
    assert order(sweeps.summarize(sweep(*jobs))) == ["SR-002", "SR-001"]
