"""Free running against answers written token by token, and figures against counts by hand."""

import pytest
import torch

from qat.evaluate import free
from qat.evaluate.free import FreeRunning, Said, common, distinct, ended, told
from tests import tiny


def test_greedy_answers_are_the_likeliest_tokens_and_drawn_ones_are_not(teacher):
    model, running = teacher.load(torch.float32, tiny.CPU), FreeRunning(teacher, 3, 6, tiny.FP32)
    figures = running.hear("teacher", model)
    said = running.said["teacher"].answers
    for prompt, answer in zip(running._asked, said["greedy"], strict=True):
        written = []
        while len(written) < 6 and not (written and written[-1] in teacher.ends()):
            written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
        assert answer == written
    assert said["drawn"] != said["greedy"]
    assert figures["greedy"]["tokens"] == sum(map(len, said["greedy"])) / 3
    again = running.hear("student", model)
    assert running.said["student"].answers == said and again["greedy"]["agreeing"] == figures["greedy"]["tokens"]


def test_answers_are_told_by_counting():
    assert [ended([1, 2], (2, 9)), ended([2, 1], (2, 9)), ended([], (2,))] == [True, False, False]
    assert [distinct([1, 2, 3]), distinct([1] * 8), distinct([1, 2, 3, 4, 1, 2, 3, 4])] == [None, 1 / 5, 4 / 5]
    assert [common([1, 2, 3], [1, 2, 4]), common([1], [1, 2]), common([2], [1])] == [2, 1, 0]
    figures = told([[1, 1, 1, 1, 1], [1, 2, 3, 9]], (9,))
    assert figures == {
        "ended": 0.5,
        "ended_stderr": pytest.approx(0.5),
        "tokens": 4.5,
        "tokens_stderr": pytest.approx(0.5),
        "distinct": 0.75,
        "distinct_stderr": pytest.approx(0.25),
    }


def test_the_page_shows_words_and_runs_nothing(teacher, monkeypatch):
    running = FreeRunning(teacher, 1, 4, tiny.FP32)
    monkeypatch.setattr(running._tokenizer, "decode", lambda *_, **__: "<script>alert(1)</script>\u202e&")
    running.prompts = ["<b>bold?</b>"]
    running.said = {"<i>": Said({"greedy": [[1]], "drawn": [[2]]}, {})}
    page = running.page()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;\\u202e&amp;") == 2


def test_the_prompts_are_many_and_no_training_prompts():
    from qat.config import DataConfig, DataSource
    from qat.data import texts

    own = free.prompts()
    assert len(set(own)) == 200
    assert not {prompt.lower() for prompt in own} & {
        prompt.lower() for prompt in texts.prompts(DataConfig("prompts", DataSource.selfgen))
    }
