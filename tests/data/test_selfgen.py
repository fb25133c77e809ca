"""The teacher writes its own training text: greedy at first, then sampled, never changed by its neighbours."""

import dataclasses

import pytest
import torch

from qat.config import DataConfig, DataSource, Start
from qat.data.selfgen import PROMPTS_AT_ONCE, Sample, answer, generate
from qat.data.thinking import chat_tokens

DATA = DataConfig(name="selfgen", source=DataSource.selfgen, answer_tokens=12, greedy_tokens=4)
PROMPTS = ["Hi", "What is the capital of France?", "Why?", "Write a poem about the sea and the wind."]


@pytest.fixture(scope="module")
def model(tiny, cpu):
    return tiny.load(cpu.dtype, cpu.device)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def asked(tokenizer):
    return [chat_tokens(tokenizer, [{"role": "user", "content": prompt}], ask=True) for prompt in PROMPTS]


@pytest.fixture
def replies(model, tokenizer):
    """The answers to rendered prompts."""

    def make(asked, seed=0, **settings):
        torch.manual_seed(seed)
        return generate(model, tokenizer, asked, dataclasses.replace(DATA, **settings), lambda amount=1, note="": None)

    return make


def plain_argmax(model, ids, count):
    """The most likely continuation, one whole forward pass a token."""
    ids, said = list(ids), []
    while len(said) < count and 257 not in said:
        with torch.inference_mode():
            said.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(said[-1])
    return said


def test_first_tokens_are_the_most_likely_ones_and_later_ones_are_not(model, asked, replies):
    greedy = [plain_argmax(model, ids, DATA.answer_tokens) for ids in asked]
    answers = replies(asked, temperature=20.0)
    assert [reply[:4] for reply in answers] == [said[:4] for said in greedy]
    assert sum(reply[4] != said[4] for reply, said in zip(answers, greedy, strict=True)) >= 3


def test_padding_does_not_change_an_answer(asked, replies):
    assert len({len(ids) for ids in asked}) > 1
    together = replies(asked, greedy_tokens=DATA.answer_tokens)
    alone = [replies([ids], greedy_tokens=DATA.answer_tokens)[0] for ids in asked]
    assert together == alone


def test_answer_ends_with_the_end_marker_or_at_its_longest(asked, replies):
    answers = replies(asked * 16, answer_tokens=40, greedy_tokens=0, temperature=50.0)
    ended = [reply for reply in answers if reply[-1] == 257]
    assert ended and min(map(len, ended)) < 40
    assert all(257 not in reply[:-1] for reply in answers)
    assert all(len(reply) == 40 for reply in answers if reply[-1] != 257)


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -0.5, 2.0, -torch.inf, 0.0, -3.0])
    draws = 40_000
    chosen = Sample(0, dataclasses.replace(DATA, greedy_tokens=0, temperature=0.7))(
        torch.zeros(draws, 3, dtype=torch.long), logits.repeat(draws, 1)
    )
    counts = chosen.argmax(1).bincount(minlength=6).double()
    expected = draws * torch.softmax(logits.double() / 0.7, 0)
    assert counts[3] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand


def test_rows_of_a_batch_are_drawn_independently():
    torch.manual_seed(0)
    sample = Sample(0, dataclasses.replace(DATA, greedy_tokens=0, temperature=1.0))
    pairs = [sample(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 2)).argmax(1).tolist() for _ in range(400)]
    for pair in ([0, 0], [0, 1], [1, 0], [1, 1]):
        assert 65 < pairs.count(pair) < 135  # 100 ± 4 σ


def test_chosen_token_is_the_only_possible_one():
    scores = torch.tensor([[0.1, 0.9, 0.3], [5.0, 0.0, 1.0]])
    assert Sample(7, DATA)(torch.zeros(2, 7, dtype=torch.long), scores).tolist() == [
        [-torch.inf, 0.0, -torch.inf],
        [0.0, -torch.inf, -torch.inf],
    ]


@pytest.fixture
def written(tiny, cpu, tmp_path):
    """What the teacher writes, in a scratch folder of its own for each name."""

    def make(prompts=PROMPTS, seed=0, scratch="scratch", **settings):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        (tmp_path / scratch).mkdir(exist_ok=True)
        data = dataclasses.replace(DATA, path=str(tmp_path / "prompts.txt"), **settings)
        return list(answer(tiny, data, seed, cpu, tmp_path / scratch))

    return make


def test_same_seed_same_text(written):
    one, same, other = (written(seed=seed, scratch=name) for seed, name in ((3, "a"), (3, "b"), (4, "c")))
    assert one == same != other


def test_every_prompt_is_asked_in_every_mode_and_number(written, asked):
    found = written(thinking="both", answers=2, temperature=20.0)
    assert sorted(prompt for prompt, _ in found) == sorted(PROMPTS * 4)
    for prompt, ids in zip(PROMPTS, asked, strict=True):
        conversations = [tokens for origin, tokens in found if origin == prompt]
        assert all(tokens[: len(ids)] == ids for tokens in conversations)
        assert len({tuple(tokens) for tokens in conversations}) == 4


def test_more_prompts_than_fit_at_once_are_all_answered(written):
    many = [f"Question {number}?" for number in range(PROMPTS_AT_ONCE["cpu"] + 3)]
    assert sorted(prompt for prompt, _ in written(many, answer_tokens=1)) == sorted(many)


def test_sampling_leaves_the_callers_randomness_alone(written):
    before = torch.random.get_rng_state()
    written(PROMPTS[:1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_that_are_there_are_not_written_again(written, tmp_path, monkeypatch):
    monkeypatch.setitem(PROMPTS_AT_ONCE, "cpu", 2)
    whole = written()
    first, second = sorted((tmp_path / "scratch").iterdir())
    stamp = first.stat().st_mtime_ns
    second.unlink()
    assert written() == whole
    assert first.stat().st_mtime_ns == stamp and second.exists()
    assert written(seed=1, scratch="other") != whole


def test_batches_of_other_settings_are_not_taken(written):
    assert written(temperature=30.0) == written(temperature=30.0, scratch="other")
    assert written(temperature=30.0) != written()


def test_without_prompts_every_token_is_a_start_once(written, tiny):
    tokenizer = tiny.tokenizer()
    found = written(start=Start.tokens, answer_tokens=1)
    firsts = [ids[1] for _, ids in found]
    assert sorted(firsts) == list(range(256))  # all but the markers, behind the begin marker
    assert firsts != sorted(firsts)
    assert all(ids[0] == tokenizer.bos_token_id and origin == f"token {ids[1]}" for origin, ids in found)
    few = written(start=Start.tokens, answer_tokens=5, documents=7, scratch="few")
    assert {ids[1] for _, ids in few} == set(firsts[:7])
