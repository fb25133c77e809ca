"""Tasks of lm-eval from files on disk, through its own harness; left out where the extra is not installed."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml

from qat import checkpoints
from qat.config import WeightConfig
from qat.conversion.convert import install
from qat.errors import ConfigError, MissingError
from qat.evaluate import local
from qat.evaluate.tasks import Harness
from qat.quant.linear import quantized
from qat.quant.places import matrix
from tests import tiny

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(outputs):
    return outputs.parent


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(0)
    return [
        {
            "question": "after " + "".join(draw.choices("abcdef", k=6)),
            "choices": [" a", " bee", " c d"],
            "answer": n % 3,
        }
        for n in range(24)
    ]


@pytest.fixture(scope="module")
def task(folder, rows):
    """A YAML file in lm-eval's format, with its data beside it."""
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(folder / "letters.yaml", folder / "letters.jsonl")


def write(path, data, **others):
    described = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path.write_text(yaml.safe_dump(described | others))
    return path


def accuracy(model, tokenizer, rows):
    """The share of rows whose answer has the likeliest tokens of all choices."""
    right = 0
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            asked, whole = (tokenizer(text)["input_ids"] for text in (row["question"], row["question"] + choice))
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(asked), len(whole))
            likelihoods.append(sum(logprobs[place - 1, whole[place]].item() for place in places))
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / len(rows)


def test_models_are_scored_side_by_side(launch, outputs, task, rows, teacher):
    words = ("checkpoint=SR-001", "evaluate.against=[teacher]", f"evaluate.tasks=[{task}]", "evaluate.chat=false")
    done, result = launch("stage=evaluate", *words)
    tokenizer = teacher.tokenizer()
    student = checkpoints.load(outputs / "SR-001" / "checkpoints" / "best", teacher, tiny.FP32)[0]
    expected = {
        "SR-001": accuracy(student, tokenizer, rows),
        "teacher": accuracy(teacher.load(torch.float32, tiny.CPU), tokenizer, rows),
    }
    found = {name: one["scores"]["letters"] for name, one in result["evaluation"]["models"].items()}
    assert {name: scores["acc"] for name, scores in found.items()} == pytest.approx(expected)
    p, n = expected["SR-001"], len(rows)
    assert found["SR-001"]["acc_stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert f"{p:.4f} ± {1.96 * found['SR-001']['acc_stderr']:.4f}" in done.stdout
    assert "cache" not in result["paths"] and result["metrics"] == {}
    assert [line for line in done.stderr.splitlines() if "not a git repository" not in line] == []  # lm-eval asks git


@pytest.mark.parametrize("fewshot", [0, 2])
def test_a_chat_has_the_figures_of_the_harnesss_own_command_line(folder, task, teacher, monkeypatch, tmp_path, fewshot):
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    # The command line reads 14,000 files for their names, which takes minutes.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    means = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "perplexity")]
    told = {"output_type": "loglikelihood", "doc_to_target": "{{choices[answer]}}", "metric_list": means}
    task = write(folder / "likely.yaml", folder / "letters.jsonl", **told)  # mean log-likelihoods: every digit counts
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    scores = Harness([str(task)], chat=True, fewshot=fewshot).run(model, tokenizer, tiny.FP32)["likely"]
    plain = Harness([str(task)], fewshot=fewshot).run(model, tokenizer, tiny.FP32)["likely"]
    words = ["run", "--model", "hf", "--model_args", f"pretrained={teacher.path},dtype=float32,enable_thinking=False"]
    words += ["--tasks", str(task), "--apply_chat_template", "--num_fewshot", str(fewshot), "--batch_size", "4"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words, "--device", "cpu", "--output_path", str(tmp_path)])
    cli_evaluate()
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["likely"]
    assert scores == {name: found[f"{name},none"] for name in scores}
    assert scores["perplexity"] < 0 and scores["perplexity"] != plain["perplexity"]


def test_the_local_tasks_need_no_network_and_score_every_row(teacher):
    scores = Harness(["local"], examples=3, chat=True).run(
        teacher.load(torch.float32, tiny.CPU), teacher.tokenizer(), tiny.FP32
    )
    assert list(scores) == list(local.NAMES)
    assert all(0 <= one["acc"] <= 1 for one in scores.values())


def test_at_most_so_many_examples(task, rows, teacher):
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    scores = Harness([str(task)], examples=5).run(model, tokenizer, tiny.FP32)
    assert scores["letters"]["acc"] == pytest.approx(accuracy(model, tokenizer, rows[:5]))


def test_a_student_whose_embedding_is_quantized_scores_as_the_same_dense_weights_do(task, teacher):
    student = teacher.load(torch.float32, tiny.CPU)
    quant = replace(tiny.QUANT, embed=WeightConfig(bits=4, rank=4))
    made = tiny.converted(student, torch.arange(256).view(8, 32), quant=quant)
    install(student, {name: module for name, (_, module, _) in made.items()})
    dense = teacher.load(torch.float32, tiny.CPU)
    with torch.no_grad():
        for name, module in quantized(student).items():
            matrix(dense, name).copy_(module.weight(torch.float32))
    ours, theirs = (Harness([str(task)]).run(one, teacher.tokenizer(), tiny.FP32) for one in (student, dense))
    assert ours == theirs


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"knows no task arc_easi \(did you mean arc_easy\?\)"):
        Harness(["arc_easi"])


def test_data_that_is_not_there_is_told(folder):
    with pytest.raises(MissingError, match=r"the data of .*lost\.yaml cannot be had"):
        Harness([str(write(folder / "lost.yaml", folder / "nowhere.jsonl"))])


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n", "output_type: multiple_choice\n", ""])
def test_a_file_that_is_no_task_is_told(folder, content):
    (folder / "broken.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"lm-eval cannot load .*broken\.yaml"):
        Harness([str(folder / "broken.yaml")])
