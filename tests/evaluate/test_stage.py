"""`stage=evaluate` in processes of its own: teacher and checkpoints side by side."""

import json
import random
import shutil

import pytest
import torch

from qat import checkpoints, stages
from qat.cli import arguments, main
from qat.errors import ArtifactError, ConfigError
from qat.evaluate import compare
from qat.evaluate.windows import Windows, read
from tests import tiny


@pytest.fixture(scope="module")
def text(outputs):
    draw = random.Random(0)
    path = outputs.parent / "long.txt"
    path.write_text(" ".join("".join(draw.choices("abcdefg", k=5)) for _ in range(120)))
    return path


def test_a_text_is_measured_side_by_side(launch, outputs, text, teacher):
    words = (f"evaluate.text={text}", "evaluate.context=64", "evaluate.stride=48", "evaluate.tokens=500")
    done, result = launch("stage=evaluate", "checkpoint=SR-001", "evaluate.against=[teacher,outputs/other]", *words)
    ids = read(str(text), teacher.tokenizer(), 500)
    student = checkpoints.load(outputs / "other", teacher, tiny.FP32)[0]
    expected = compare(student, teacher.load(torch.float32, tiny.CPU), Windows(ids, 64, 48), 8, tiny.FP32)
    found = result["evaluation"]
    assert list(found["models"]) == ["SR-001", "teacher", "outputs/other"]
    for name in ("SR-001", "outputs/other"):  # made alike
        assert found["models"][name]["metrics"] == pytest.approx(vars(expected.metrics()), rel=1e-3)
        low, high = found["models"][name]["intervals"]["kl"]
        assert (low, high) == pytest.approx(expected.intervals()["kl"], rel=1e-3) and low < result["metrics"][
            "kl"
        ] < high
        assert found["models"][name]["quant"]["layers"] == 14
    assert found["models"]["teacher"]["metrics"]["kl"] == 0
    assert found["models"]["teacher"]["metrics"]["perplexity"] == pytest.approx(result["metrics"]["teacher_perplexity"])
    assert found["on"].endswith("long.txt, windows of 64 tokens, stride 48") and "bootstrap" in found["interval"]
    header = next(line for line in done.stdout.splitlines() if "SR-001" in line and "teacher" in line)
    assert "outputs/other" in header
    assert f"{result['metrics']['kl']:.4f} ±" in done.stdout
    assert "artifacts" not in result["paths"].get("cache", "")  # none was made
    samples = (outputs / result["run_id"] / "samples.md").read_text()
    assert all(f"**{name}**" in samples for name in found["models"])


@pytest.fixture
def run(command, outputs, tmp_path):
    """The stage within this process, in a folder of its own; returns its record."""

    def measure(*words):
        config = main.check(arguments.parse(command("stage=evaluate", *words)[2:])).configs[0]
        stages.run_job(config, tmp_path)
        return json.loads((tmp_path / "result.json").read_text())

    return measure


def test_kl_by_position_comes_as_a_table_a_picture_and_figures(run, text, outputs, tmp_path, capsys):
    result = run(f"evaluate.text={text}", "checkpoint=SR-001")
    assert "one window of 719 tokens" in result["evaluation"]["on"]  # all of it: tiny is made for 1024
    bands = result["evaluation"]["models"]["SR-001"]["positions"]
    assert [band["first"] for band in bands] == [0, 64, 128, 256, 512]
    assert sum(band["count"] for band in bands) == 718
    assert [result["metrics"][f"kl_{band['first']}_{band['end']}"] for band in bands] == [band["kl"] for band in bands]
    mean = sum(band["kl"] * band["count"] for band in bands) / 718
    assert mean == pytest.approx(result["metrics"]["kl"], rel=1e-9)
    assert (tmp_path / "positions.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "512 to 1,023" in shown and f"{bands[1]['kl']:.4f}" in shown
    told = f"KL at 64 to 127 {bands[1]['kl']:.4f}, KL at 512 to 1,023 {bands[-1]['kl']:.4f}"
    assert told in (outputs / "RUNS.md").read_text()


def test_answers_come_as_a_table_a_page_and_figures(run, tmp_path, capsys):
    result = run("checkpoint=SR-001", "evaluate.answers=2", "evaluate.answer_tokens=5")
    found = result["evaluation"]["models"]
    assert list(found) == ["SR-001", "teacher"] and "agreeing" not in found["teacher"]["answers"]["greedy"]
    assert result["metrics"]["drawn_ended"] == found["SR-001"]["answers"]["drawn"]["ended"]
    assert 0 <= result["metrics"]["greedy_agreeing"] <= result["metrics"]["greedy_tokens"] <= 5
    shown = capsys.readouterr().out
    assert "greedy: end by themselves" in shown and "answers.html" in shown
    assert (tmp_path / "answers.html").read_text().count("<article>") == 2 * 2 * 2
    assert "cache" not in result["paths"] and "kl" not in result["metrics"]


def test_the_teacher_alone_has_its_perplexity(run, text):
    result = run(f"evaluate.text={text}", "evaluate.context=64", "evaluate.stride=64")
    assert list(result["evaluation"]["models"]) == ["teacher"]
    assert result["metrics"]["perplexity"] == result["metrics"]["teacher_perplexity"]
    assert result["quant"] == {"preset": None}


def test_a_cache_is_measured_with_intervals_too(run, cache, teacher, outputs):
    result = run("checkpoint=SR-001", "cache=local", f"cache.path={cache.folder}")
    found = result["evaluation"]["models"]
    assert list(found) == ["SR-001", "teacher"]
    for name, (low, high) in found["SR-001"]["intervals"].items():
        assert low <= result["metrics"][name] <= high and low < high


def test_windows_longer_than_the_model_was_made_for_are_refused(run, text):
    with pytest.raises(ConfigError, match=r"^evaluate\.context=2048: tiny is made for at most 1024 tokens$"):
        run(f"evaluate.text={text}", "evaluate.context=2048")


def test_a_checkpoint_of_another_teacher_is_refused_before_anything_is_measured(run, outputs, text, monkeypatch):
    shutil.copytree(outputs / "other", outputs / "foreign")
    manifest = outputs / "foreign" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"teacher": "', '"teacher": "x'))
    monkeypatch.setattr("qat.stages.evaluate.compare", lambda *_: pytest.fail("measured"))
    with pytest.raises(ArtifactError, match="other weights than those of tiny"):
        run("checkpoint=SR-001", f"evaluate.against=[{outputs}/foreign]", f"evaluate.text={text}")
