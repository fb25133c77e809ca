from dataclasses import replace

import pytest
import torch

from qat import checkpoints
from qat.cache.reader import CacheReader
from qat.errors import NumericsError
from qat.evaluate import answers, evaluate
from qat.quant.linear import quantized
from tests import tiny

PROMPTS = ("What?", "Tell me about the sea and the sky.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def held_out(cache):
    return CacheReader(cache, "eval")


@pytest.fixture(scope="module")
def rows(held_out):
    return held_out.input_ids(held_out.rows)


@pytest.fixture
def student(teacher, cache, folder):
    if not (folder / "student").exists():
        tiny.checkpoint_in(folder / "student", teacher, cache)
    return checkpoints.load(folder / "student", teacher, tiny.FP32)[0]


def exactly(teacher, student, rows, top_k) -> dict[str, float]:
    """The figures in float64, from the probabilities of both models at every position at once."""
    with torch.no_grad():
        theirs = teacher.load(torch.float64, tiny.CPU)(rows).logits[:, :-1]
        ours = tiny.exact_logits(teacher, student, tiny.exact_weights(student), rows)[:, :-1]
    p, q = theirs.softmax(-1), ours.softmax(-1)
    top = theirs.argsort(-1, descending=True)[..., :top_k]
    warm_p, warm_q = ((x.gather(-1, top) / 2).softmax(-1) for x in (theirs, ours))
    actual = rows[:, 1:, None]
    return {
        "kl": (p * (p / q).log()).sum(-1).mean().item(),
        "kd_loss": 4 * (warm_p * (warm_p / warm_q).log()).sum(-1).mean().item(),
        "perplexity": q.gather(-1, actual).log().mean().neg().exp().item(),
        "teacher_perplexity": p.gather(-1, actual).log().mean().neg().exp().item(),
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize(("micro_batch", "top_k"), [(1, 8), (5, 3), (64, 8)])
def test_figures_are_those_of_the_exact_distributions(teacher, student, held_out, rows, micro_batch, top_k):
    model = teacher.load(torch.float32, tiny.CPU)
    found = evaluate(student, model, held_out, top_k, replace(tiny.FP32, micro_batch=micro_batch))
    expected = exactly(teacher, student, rows, top_k)
    assert vars(found) == pytest.approx(expected, rel=1e-3)
    assert found.top1_agreement == pytest.approx(expected["top1_agreement"], abs=1e-9)
    assert found.kl > 0 and 0 < found.top1_agreement < 1 and found.perplexity > 1


def test_the_teacher_is_its_own_best_student(teacher, held_out):
    model = teacher.load(torch.float32, tiny.CPU)
    found = evaluate(model, model, held_out, 8, tiny.FP32)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.kd_loss == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1 and found.perplexity == found.teacher_perplexity


def test_the_student_is_left_unbaked(teacher, student, held_out):
    evaluate(student, teacher.load(torch.float32, tiny.CPU), held_out, 8, tiny.FP32)
    assert all(module.dense is None for module in quantized(student).values())


def test_a_student_with_nan_is_refused(teacher, student, held_out):
    with torch.no_grad():
        next(iter(quantized(student).values())).lut.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        evaluate(student, teacher.load(torch.float32, tiny.CPU), held_out, 8, tiny.FP32)


def test_an_answer_is_the_likeliest_token_one_after_the_other(teacher):
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    written = []
    for _ in range(6):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(written, skip_special_tokens=True).strip()
    assert answers(model, tokenizer, PROMPTS[:1], 6, tiny.FP32) == [expected]


def test_answers_do_not_depend_on_the_prompts_beside_them(teacher, student):
    tokenizer = teacher.tokenizer()
    together = answers(student, tokenizer, PROMPTS, 8, tiny.FP32)
    assert together == [answers(student, tokenizer, (prompt,), 8, tiny.FP32)[0] for prompt in PROMPTS]
