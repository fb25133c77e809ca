"""RUNS.md: every run in the log's template, the same bytes whenever it is made again."""

import json

import pytest

from qat import records
from qat.report import log
from qat.stages.evaluate import samples
from tests.report import synthetic


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    synthetic.fill(folder, 30, steps=4)
    return folder


def test_deleted_log_comes_back_with_the_same_bytes(outputs):
    first = log.write(outputs).read_bytes()
    (outputs / log.FILE).unlink()
    assert log.write(outputs).read_bytes() == first
    assert len(first) > 1000


def test_every_run_is_there_in_order_whatever_became_of_it(outputs):
    heads = [line for line in log.render(outputs).splitlines() if line.startswith("### ")]
    assert [head.split()[1] for head in heads] == [f"SR-{number:03d}" for number in range(1, 31) if number != 17]
    assert {head.rsplit(" ", 1)[1] for head in heads} == {"complete", "interrupted"}


def test_template_holds_what_a_run_says(outputs):
    record = next(run for run in records.runs(outputs) if run.run_id == "SR-001")
    text = log.render(outputs).split("### SR-001")[1].split("### SR-002")[0]
    assert [line.split("**")[1] for line in text.splitlines() if line.startswith("- ")] == [
        "Goal",
        "Instance",
        "Config",
        "Command",
        "Result",
        "Conversion",
        "Notes",
        "Folder",
    ]
    initial, final = (record.number("metrics", f"kd_loss_{when}") for when in ("initial", "final"))
    assert f"KD loss {initial:.4f} → {final:.4f}" in text
    assert f"`{record.text('command')}`" in text
    assert "**Conversion**: 1 min 40 s" in text and "**Instance**: auto, cpu, bfloat16, x86" in text
    assert "checkpoint=teacher cache=L64" in text and f"train.lr={record.result['config']['train']['lr']}" in text


def test_what_a_run_left_dense_is_told_with_what_it_makes_of_the_whole(outputs):
    path = outputs / "SR-001" / "result.json"
    result = json.loads(path.read_text())
    result["quant"] |= {"dense": {"model.layers.*.mlp.experts.up_proj": 0.25, "x": 0.5}, "model_bits_per_weight": 9.5}
    path.write_text(json.dumps(result))
    text = log.render(outputs).split("### SR-001")[1].split("### SR-002")[0]
    assert (
        "- **Left dense**: 75.0% of the decoder's weights (`model.layers.*.mlp.experts.up_proj` 25.0%, `x` 50.0%)\n"
    ) in text
    assert "- **Size**: 9.50 bits a weight, " in text and "MB" not in text


def test_checkpoints_come_with_losses_and_caches_with_sizes(outputs):
    (outputs / "artifacts" / "caches" / "L64-abc" / "train-00000.safetensors").write_bytes(b"x" * 3_000_000)
    text = log.render(outputs)
    best = records.runs(outputs)[0]
    loss = best.number("metrics", "kd_loss_best")
    assert f"| `{best.text('name')}` | {loss:.4f} |" in text
    assert "`artifacts/checkpoints/tiny_q2a4_init-abc`" in text
    assert "| `L64` | 340 | 3.0 MB | `artifacts/caches/L64-abc` |" in text


def test_conversions_say_their_own_losses_whether_a_run_used_them_or_not(outputs):
    measured = {"before": {"kd_loss": 0.1, "kl": 0.2}, "after": {"kd_loss": 1.25, "kl": 0.75}}
    converted = {"name": "tiny_q4a4_init", "bits_per_weight": 4.5, "metrics": measured}
    trained = {"name": "tiny_q4a4_e2e", "bits_per_weight": 4.5, "kd_loss_initial": 1.25, "kd_loss_best": 0.5}
    for folder, manifest in (("q4_init", converted), ("q4_e2e", trained), ("older", {"name": "older"})):
        synthetic.write(outputs / "artifacts" / "checkpoints" / folder / "manifest.json", manifest)
    text = log.render(outputs)
    assert "| `tiny_q4a4_init` | 1.2500 | 0.7500 | – | – | 4.50 | `artifacts/checkpoints/q4_init` |" in text
    assert "| `tiny_q4a4_e2e` | 0.5000 | – | – | – | 4.50 | `artifacts/checkpoints/q4_e2e` |" in text
    assert "| `older` | – | – | – | – | – | `artifacts/checkpoints/older` |" in text
    done = [run for run in records.runs(outputs) if run.status == "complete"]
    used = next(run for run in done if run.text("quant", "preset") == "q2a4")
    before = [used.number("metrics", key) for key in ("kd_loss_initial", "kl_initial")]
    assert "| `tiny_q2a4_init` | {:.4f} | {:.4f} | – | – | 3.56 |".format(*before) in text


def changed(outputs, run_id, **words):
    """Rewrites what a run says of itself."""
    path = next(run.folder for run in records.runs(outputs) if run.run_id == run_id) / "result.json"
    synthetic.write(path, json.loads(path.read_text()) | words)


def test_what_trains_nothing_is_one_line_and_no_run(outputs):
    evaluated = {"models": {"SR-001": {}, "teacher": {}}, "on": "wiki.txt, windows of 9 tokens, stride 3"}
    figures = {"kl": 0.5, "kd_loss": 0.25, "perplexity": 12.0}
    changed(outputs, "SR-002", stage="evaluate", name="", evaluation=evaluated, metrics=figures)
    exported = {"checkpoint": {"name": "local", "path": "SR-001/checkpoints/best"}, "export": {"name": "packed"}}
    size = {"export_bytes": 3.1e7}
    paths = {"export": "there"}
    changed(outputs, "SR-003", stage="export", config=exported, metrics={"parity": 2e-6}, memory=size, paths=paths)
    changed(outputs, "SR-004", stage="cache", status="failed", error="no | text")
    text = log.render(outputs)
    assert not any(f"### {name}" in text for name in ("SR-002", "SR-003", "SR-004"))
    lines = text.split("## Caches, evaluations, exports and what came to nothing")[1].splitlines()
    assert lines[4:7] == [
        "| SR-002 | evaluate | complete | SR-001, teacher | full KL 0.5000, KD loss 0.2500, perplexity 12.0000 on"
        " wiki.txt, windows of 9 tokens, stride 3 | 5 min 02 s | `SR-002` |",
        "| SR-003 | export | complete | SR-001/checkpoints/best | packed, there, 31.0 MB, logits within 2.0e-06 |"
        " 5 min 03 s | `SR-003` |",
        "| SR-004 | cache | failed | teacher | no \\| text | 5 min 04 s | `SR-004` |",
    ]


def test_conversions_are_listed_by_instance_and_cores(outputs):
    made = {"at": "2026-11-28T14:03:59+0000", "seconds": 138.2, "device": "cpu, bfloat16", "instance": "t4", "cores": 2}
    for name, cores, seconds in (("many", 12, 138.2), ("many", 12, 180), ("few", 2, 138.2)):
        manifest = {"name": name, "figures": {}, "made": made | {"cores": cores, "seconds": seconds}}
        synthetic.write(outputs / "artifacts" / "checkpoints" / f"{name}{seconds}" / "manifest.json", manifest)
    text = log.render(outputs).split("## Conversion times")[1].split("##")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| t4")]
    where = ["| t4", "cpu, bfloat16"]
    assert rows[0][2:4] == ["2", "1"] and rows[0][-1] == "`few` |"
    assert rows[1] == [*where, "12", "2", "2 min 18 s to 3 min 00 s", "2026-11-28 14:03", "`many` |"]
    unknown = "| – | – | – | 1 | – | – | `tiny_q2a4_init` |"
    assert unknown in text  # made before that was recorded


def test_a_reused_conversion_says_when_it_was_made_and_how_long_that_took(outputs):
    made = {"at": "2026-11-28T14:03:59+0000", "seconds": 138.2, "device": "cpu, bfloat16", "cores": 2}
    changed(outputs, "SR-001", reused={"convert": {"path": "x", "made": made}}, timing={"convert_s": 0.02})
    changed(outputs, "SR-002", reused={"convert": {"path": "x", "made": None}}, timing={"convert_s": 0.02})
    text = log.render(outputs)
    told = "**Conversion**: reused, made 2026-11-28 14:03 in 2 min 18 s on cpu, bfloat16, 2 cores"
    assert told in text.split("### SR-001")[1].split("###")[0]
    assert "**Conversion**: reused, made before that was recorded" in text.split("### SR-002")[1].split("###")[0]


def test_a_run_says_what_it_was_measured_on_what_is_wrong_with_it_and_that_it_went_on(outputs):
    ground = {"teacher": {"name": "tiny", "fingerprint": "f"}, "text": "abc", "called": "held-out text of L64"}
    again = [{"started": "2026-11-28T14:03:59+0000", "command": "python launch.py run.resume=SR-001"}]
    changed(outputs, "SR-001", measured_on=ground, verdict="worse than its conversion: full KL 2 instead of 1")
    changed(outputs, "SR-002", resumed=again)
    text = log.render(outputs)
    first, second = (text.split(f"### {name}")[1].split("###")[0] for name in ("SR-001", "SR-002"))
    assert "**Measured on**: tiny, held-out text of L64 (abc)" in first
    assert "**Result**: **worse than its conversion: full KL 2 instead of 1**; KD loss" in first
    assert "**Resumed**: once 2026-11-28T14:03:59+0000 by `python launch.py run.resume=SR-001`" in second
    assert "Measured on" not in second and "Resumed" not in first


def test_failure_says_why(outputs):
    changed(outputs, "SR-017", metrics={"kd_loss_initial": 1.0})
    assert "**Result**: failed: no space left on the disk" in log.render(outputs).split("### SR-017")[1]


def test_a_run_that_came_to_nothing_is_one_line(outputs):
    (line,) = [line for line in log.render(outputs).splitlines() if "SR-017" in line]
    assert line.startswith("| SR-017 | run | failed | teacher q") and "| no space left on the disk |" in line


def test_quality_is_one_line_a_teacher_and_text(tmp_path):
    synthetic.varied(tmp_path / "outputs")
    text = log.render(tmp_path / "outputs")
    lines = text.split("## Quality")[1].split("\n## ")[0].strip().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| smollm2_135m, {text}" for text in synthetic.TEXTS]
    runs = [run for run in records.runs(tmp_path / "outputs") if run.trains and run.status == "complete"]
    for line, called in zip(lines, synthetic.TEXTS, strict=True):
        of = [run for run in runs if run.text("measured_on", "called") == called]
        best = min(of, key=lambda run: run.result["metrics"]["kl"])
        before, after = (best.number("metrics", key) for key in ("kl_initial", "kl"))
        assert line.split(" | ")[1:3] == [str(len(of)), f"{before:.4f} → {after:.4f}"]
        assert line.endswith(f" | {best.run_id} `q4a4` |")


def test_a_run_kept_offline_says_how_it_is_sent(tmp_path):
    synthetic.varied(tmp_path / "outputs")
    text = log.render(tmp_path / "outputs")
    assert text.count("**wandb**") == 1
    told = text.split("### SR-003")[1].split("###")[0]
    assert "`wandb sync SR-003/wandb/offline-run-20261103_100000-a1b2c3d4`" in told


def test_empty_outputs_have_a_log(tmp_path):
    assert log.render(tmp_path).count("None yet.") == 2


def test_words_stay_words(tmp_path):
    synthetic.fill(tmp_path, 1, steps=1, goal="a | b\n# <b>c</b> `d` *e* f_g _h_", notes="x\n\n- y")
    text = log.render(tmp_path)
    assert r"**Goal**: a \| b \# \<b\>c\</b\> \`d\` \*e\* f_g \_h\_" in text
    assert "**Notes**: x - y" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"metrics": 3, "run_id": ["x"], "quant": null}', "\xff"])
def test_damaged_record_is_listed_as_such(tmp_path, content):
    (tmp_path / "SR-004").mkdir()
    (tmp_path / "SR-004" / "result.json").write_bytes(content.encode("latin-1"))
    assert "· unreadable" in log.render(tmp_path)


def test_log_that_cannot_be_written_fails_no_run(tmp_path, caplog):
    (tmp_path / log.FILE).mkdir()
    log.refresh(tmp_path)
    assert "was not brought up to date" in caplog.text


def test_samples_are_read_as_they_were_written(tmp_path):
    said = {"teacher": ["Paris.", "Two\n\nlines"] + ["x"] * 3, "distilled": ["", "> quoted"] + ["y **z**"] * 3}
    prompts = ["What is the capital of France?", *"abcd"]
    (tmp_path / "samples.md").write_text(samples("The same prompts", prompts, said))
    read = records.samples(tmp_path)
    assert [sample["answers"]["teacher"] for sample in read] == said["teacher"]
    assert [sample["answers"]["distilled"] for sample in read] == ["(nothing)", "> quoted", *["y **z**"] * 3]
    assert [sample["prompt"] for sample in read] == prompts


def test_metrics_cut_short_by_a_kill_are_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert records.metrics(tmp_path) == [json.loads('{"step": 1, "loss": 2}')]
