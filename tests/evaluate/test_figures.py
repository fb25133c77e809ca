from dataclasses import replace

import pytest
import torch

from qat import checkpoints
from qat.cache.batch import Text
from qat.cache.reader import CacheReader
from qat.data.asking import asked
from qat.errors import NumericsError
from qat.evaluate import Comparison, answers, compare, evaluate
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


def test_sums_are_those_of_each_row(teacher, student, held_out, rows):
    model = teacher.load(torch.float32, tiny.CPU)
    found = compare(student, model, held_out, 8, replace(tiny.FP32, micro_batch=3))
    assert found.counts_N.tolist() == [rows.shape[1] - 1] * held_out.rows
    for row in (0, 4, held_out.rows - 1):
        expected = exactly(teacher, student, rows[row : row + 1], 8)
        alone = Comparison(found.sums_NF[row : row + 1], found.counts_N[row : row + 1])
        assert vars(alone.metrics()) == pytest.approx(expected, rel=1e-3)


def test_the_teacher_is_seen_beside_any_student(teacher, student, held_out):
    model = teacher.load(torch.float32, tiny.CPU)
    derived = compare(student, model, held_out, 8, tiny.FP32).of_teacher()
    direct = compare(model, model, held_out, 8, tiny.FP32)
    assert vars(derived.metrics()) == pytest.approx(vars(direct.metrics()), abs=1e-6)
    assert derived.intervals()["perplexity"] == pytest.approx(direct.intervals()["perplexity"])


def made(rows, seed):
    """Rows of different lengths whose figures scatter about 1 from row to row."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(10, 40, (rows,), generator=draw)
    means = 1 + 0.3 * torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    return Comparison(means * counts[:, None], counts)


def test_intervals_are_as_wide_as_the_standard_error_of_a_ratio_says():
    found = made(400, 0)
    ratio = found.sums_NF.sum(0) / found.counts_N.sum()
    residual = found.sums_NF - ratio * found.counts_N[:, None]
    error = residual.pow(2).sum(0).sqrt() / found.counts_N.sum()
    low, high = found.intervals()["kl"]
    assert high - low == pytest.approx(2 * 1.96 * error[0].item(), rel=0.1)
    low, high = (torch.tensor(end).log() for end in found.intervals()["perplexity"])
    assert (high - low).item() == pytest.approx(2 * 1.96 * error[2].item(), rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    ends = [made(40, seed).intervals()["kl"] for seed in range(100)]
    assert 88 <= sum(low < 1 < high for low, high in ends) <= 99


def test_rows_that_are_alike_leave_no_doubt():
    found = Comparison(torch.full((20, 5), 3.0).double(), torch.full((20,), 6))
    assert found.intervals()["kl"] == pytest.approx((0.5, 0.5))


def test_the_student_is_left_unbaked(teacher, student, held_out):
    evaluate(student, teacher.load(torch.float32, tiny.CPU), held_out, 8, tiny.FP32)
    assert all(module.dense is None for module in quantized(student).values())


def test_a_student_with_nan_is_refused(teacher, student, held_out):
    with torch.no_grad():
        next(iter(quantized(student).values())).codebook.fill_(float("nan"))
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
    assert answers(model, tokenizer, [ids], teacher.ends(), 6, tiny.FP32) == [expected]


def test_answers_do_not_depend_on_the_prompts_beside_them(teacher, student):
    tokenizer = teacher.tokenizer()
    prompts = [asked(tokenizer, prompt) for prompt in PROMPTS]
    together = answers(student, tokenizer, prompts, teacher.ends(), 8, tiny.FP32)
    assert together == [answers(student, tokenizer, [ids], teacher.ends(), 8, tiny.FP32)[0] for ids in prompts]


def test_nothing_that_counts_gives_no_figures(teacher, cpu):
    class Nothing(Text):
        def batch(self, rows):
            found = super().batch(rows)
            found.stored["loss_mask"].zero_()
            return found

    model = teacher.load(torch.float32, torch.device("cpu"))
    with pytest.raises(NumericsError, match="no position of the text that is measured counts"):
        compare(model, model, Nothing(torch.arange(40).reshape(4, 10)), 3, cpu)


def test_rows_without_a_position_leave_the_intervals_as_they_are():
    draw = torch.Generator().manual_seed(0)
    sums, counts = torch.rand(3, 5, generator=draw, dtype=torch.float64), torch.tensor([4, 5, 6])
    with_none = Comparison(torch.cat([sums, torch.zeros(9, 5)]), torch.cat([counts, torch.zeros(9, dtype=torch.long)]))
    assert with_none.intervals() == Comparison(sums, counts).intervals()
