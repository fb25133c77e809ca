"""SR-001 of the older scripts' run log, step by step as single commands: pull, convert, look, train, evaluate, export.

docs/MIGRATION.md has the same steps for Qwen3-0.6B.
"""

import json

import pytest

from qat.artifacts import open_artifact
from tests import old_drive, tiny
from tests.test_pipeline import Shop

STUDENT = ["+debug=tiny", "cache=alpaca_L64", "instance.precision=fp32", "evaluate.sample_tokens=1"]
TRAINING = ["loss=topk_kl", "mode=mlp", "train.steps=20", "train.batch_size=16", "train.lr=3e-3", "train.eval_every=20"]


class Desk:
    """A machine with an outputs folder and a mounted Drive."""

    def __init__(self, outputs, drive):
        self.shop, self.outputs, self.store = Shop(outputs), outputs, ["store=gdrive", f"store.path={drive}"]

    def says(self, *words):
        """What a command prints that succeeds."""
        done = self.shop.launch(*words)
        assert (done.code, done.err) == (0, ""), (words, done.out, done.err)
        return done.out

    def runs(self, run_id, *words):
        """The record of the run that a command makes."""
        self.says(*words)
        return json.loads((self.outputs / run_id / "result.json").read_text())


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "drive"
    old_drive.fill(folder, tiny.teacher_in(folder.parent))
    return folder


def test_sr_001_as_single_commands(drive, tmp_path):
    desk = Desk(tmp_path / "outputs", drive)
    desk.says("stage=pull", "cache=alpaca_L64", "checkpoint=q4_fp32", *desk.store)

    converted = desk.runs("SR-001", "stage=convert", "checkpoint=q4_fp32", "quant=q2a4_r4", *STUDENT)
    before = open_artifact(tmp_path / converted["paths"]["conversion"]).manifest["metrics"]["before"]
    assert 3 * before["kl"] < converted["metrics"]["kl"], (before, converted["metrics"])  # four bits, then two

    looked = desk.runs("SR-002", "stage=evaluate", "checkpoint=SR-001", "evaluate.against=[q4_fp32]", *STUDENT)
    found = looked["evaluation"]["models"]
    assert list(found) == ["SR-001", "q4_fp32", "teacher"]
    for name, figures in {"SR-001": converted["metrics"], "q4_fp32": before}.items():
        for key in ("kl", "kd_loss", "perplexity"):
            assert found[name]["metrics"][key] == pytest.approx(figures[key], rel=1e-4), (name, key)
    desk.says("stage=chat", "checkpoint=SR-001", "chat.prompt=hi", "chat.max_tokens=4", *STUDENT)
    desk.says("stage=push", "checkpoint=SR-001", "store.archive=q2_init_from_q4", *desk.store)

    trained = desk.runs("SR-003", "stage=distill", "checkpoint=SR-001", *STUDENT, *TRAINING)
    assert trained["metrics"]["kd_loss_initial"] == pytest.approx(converted["metrics"]["kd_loss"], rel=0.02)
    assert trained["metrics"]["kd_loss_final"] < 0.99 * trained["metrics"]["kd_loss_initial"]

    against = "evaluate.against=[SR-001,q4_fp32]"
    compared = desk.runs("SR-004", "stage=evaluate", "checkpoint=SR-003", against, *STUDENT)["evaluation"]["models"]
    assert list(compared) == ["SR-003", "SR-001", "q4_fp32", "teacher"]
    assert compared["SR-001"]["metrics"] == found["SR-001"]["metrics"]
    assert compared["SR-003"]["metrics"]["kl"] < compared["SR-001"]["metrics"]["kl"]

    export = ("stage=export", "export=anemll_v2", f"export.output={tmp_path}/export")
    assert desk.runs("SR-005", *export, "checkpoint=SR-001", *STUDENT)["metrics"]["parity"] < 1e-5
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| run | SR-001 |" in card and "train.steps" not in card  # it was converted, not trained

    text = (desk.outputs / "RUNS.md").read_text()
    assert "| `q4_fp32` | 0.7312 |" in text and "| `alpaca_L64` |" in text
    assert f"checkpoint={desk.outputs}/SR-001 " in text

    elsewhere = Desk(tmp_path / "another machine", drive)
    from_there = ["checkpoint=q2_init", "cache=alpaca_L64", *elsewhere.store]
    again = elsewhere.runs("SR-001", "stage=distill", *STUDENT, *TRAINING, "train.steps=1", *from_there)
    assert again["metrics"]["kd_loss_initial"] == pytest.approx(trained["metrics"]["kd_loss_initial"], rel=1e-4)
