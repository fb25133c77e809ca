"""The teacher writes its own training text: from prompts, tokens, openings of a text and its own questions."""

import dataclasses
import gc
import json
import logging
import re
import weakref
from functools import partial

import pytest
import torch

from qat.config import DataConfig, DataSource, Start
from qat.data import selfgen, sources
from qat.data.documents import Document
from qat.data.selfgen import answer
from qat.data.tally import Tally
from qat.data.thinking import chat_tokens, user_turn
from qat.generation import TEXTS_A_ROW
from qat.generation.rows import PROMPTS_AT_ONCE

DATA = DataConfig(name="prompts", source=DataSource.selfgen, answer_tokens=12, greedy_tokens=4)
PROMPTS = ["Hi", "What is the capital of France?", "Why?", "Write a poem about the sea and the wind."]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def asked(tokenizer):
    return [chat_tokens(tokenizer, [{"role": "user", "content": prompt}], ask=True) for prompt in PROMPTS]


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
    many = [f"Question {number}?" for number in range(TEXTS_A_ROW * PROMPTS_AT_ONCE["cpu"] + 3)]
    assert sorted(prompt for prompt, _ in written(many, answer_tokens=1)) == sorted(many)


def test_sampling_leaves_the_callers_randomness_alone(written):
    before = torch.random.get_rng_state()
    written(PROMPTS[:1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_that_are_there_are_not_written_again(written, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "qat")
    monkeypatch.setitem(PROMPTS_AT_ONCE, "cpu", 1)
    written = partial(written, [*PROMPTS, "And why not?"])
    whole = written()
    first, second = sorted((tmp_path / "scratch").iterdir())
    stamp = first.stat().st_mtime_ns
    second.unlink()
    (whole_line,) = (line for line in caplog.messages if line.startswith("teacher answers:"))
    assert written() == whole
    said = [line for line in caplog.messages if line.startswith("teacher answers:")][1]
    assert re.match(r"teacher answers: [\d,]+ tokens in ", whole_line)
    assert re.match(r"teacher answers: [\d,]+ of [\d,]+ tokens in ", said)
    assert first.stat().st_mtime_ns == stamp and second.exists()
    assert written(seed=1, scratch="other") != whole


def test_text_that_nobody_takes_any_more_is_not_written_on(tiny, cpu, tmp_path, monkeypatch):
    monkeypatch.setitem(PROMPTS_AT_ONCE, "cpu", 2)
    text = answer(tiny, dataclasses.replace(DATA, start=Start.tokens, answer_tokens=64), 0, cpu, tmp_path)
    next(text)
    text.close()
    assert len(list(tmp_path.iterdir())) == 1  # of 32: on a processor no batch is written ahead


def test_sources_that_write_at_a_time_have_one_teacher_between_them(tiny, cpu):
    first = tiny.shared(cpu.dtype, cpu.device)
    assert tiny.shared(cpu.dtype, cpu.device) is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None  # and nobody keeps it when all have written


def test_a_fault_while_writing_ends_the_reading(written, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(selfgen.Writer, "__call__", broken)
    with pytest.raises(RuntimeError, match="out of ink"):
        written()


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


@pytest.fixture
def texts(tmp_path):
    """Two files: paragraphs of several lengths, and rows."""
    paragraphs = [f"Paragraph {number}: " + "word " * (number * 3) for number in range(8)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "A row of text."}, {"output": "An answer, as a text."}]))
    return [str(tmp_path / "text.txt"), str(tmp_path / "rows.json")]


def opened(tiny, cpu, folder, texts, seed=0, **settings):
    folder.mkdir(exist_ok=True)
    settings = {"answer_tokens": 20, "greedy_tokens": 0, **settings}
    data = dataclasses.replace(DATA, path=texts, start=Start.openings, **settings)
    return data, list(answer(tiny, data, seed, cpu, folder))


def test_passages_are_gone_on_with_from_their_first_tokens(tiny, cpu, tmp_path, texts, tokenizer):
    data, found = opened(tiny, cpu, tmp_path / "a", texts)
    documents = dict(sources.plain(data, tokenizer, Tally.of(data)))
    assert {origin for origin, _ in found} == set(documents) and len(documents) == 10
    lengths = set()
    for origin, ids in documents.items():
        cuts = [ids[first : first + 4] for first in range(0, len(ids), 20) if len(ids) - first >= 4]
        written = [tokens for found_in, tokens in found if found_in == origin]
        assert sorted(tokens[:4] for tokens in written) == sorted(cuts)
        for tokens in written:  # an opening of 4 to 32 tokens of the passage, then at most 20 of the teacher's
            starts = [first for first in range(0, len(ids), 20) if ids[first : first + 4] == tokens[:4]]
            shared = max(
                next((n for n, (a, b) in enumerate(zip(tokens, ids[first:], strict=False)) if a != b), len(tokens))
                for first in starts
            )
            assert shared >= min(4, len(tokens)) and len(tokens) <= 52
            lengths.add(len(tokens))
    assert len(lengths) > 4


def test_passages_of_a_document_stand_on_one_side_with_its_text(tiny, cpu, tmp_path, texts, tokenizer):
    data, found = opened(tiny, cpu, tmp_path / "a", texts)
    as_text = dataclasses.replace(data, source=DataSource.text)
    rendered = sources.render(as_text, tokenizer, Tally.of(data))
    sides = {origin: Document(origin, ids).split(0.4) for origin, ids in rendered}
    assert len(found) > len(sides) and set(sides.values()) == {"train", "eval"}
    assert all(Document(origin, ids).split(0.4) == sides[origin] for origin, ids in found)


def test_openings_are_drawn_by_the_seed_and_bounded(tiny, cpu, tmp_path, texts):
    one, same, other = (
        opened(tiny, cpu, tmp_path / name, texts, seed)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same != other
    few = opened(tiny, cpu, tmp_path / "few", texts, documents=3, answers=2)[1]
    assert len(few) == 6 and {origin for origin, _ in few} <= {origin for origin, _ in one}


def test_user_turn_is_what_the_template_puts_around_a_question(tokenizer):
    opening, end = user_turn(tokenizer)
    question = tokenizer("Why?", add_special_tokens=False)["input_ids"]
    assert [*opening, *question, end] == chat_tokens(tokenizer, [{"role": "user", "content": "Why?"}])


def test_the_teacher_answers_its_own_questions(written, tokenizer, monkeypatch):
    """Questions are cut to what fits; each is then an ordinary prompt, asked as often as prompts are."""
    asked = {}
    write = selfgen._Author.write

    def watched(self, what, prompts, sampling, seed):
        replies = list(write(self, what, prompts, sampling, seed))
        if what == "teacher questions":  # the tiny model hardly ever ends a turn by itself
            replies = [[*reply[: 3 + number % 5], 257] for number, reply in enumerate(replies)]
            replies[0] = replies[0][:-1]
        asked[what] = prompts, replies, sampling
        yield from replies

    monkeypatch.setattr(selfgen._Author, "write", watched)
    found = written(start=Start.questions, documents=12, answers=2)
    opening, end = user_turn(tokenizer)
    prompts, turns, sampling = asked["teacher questions"]
    assert prompts == [opening] * 12 and sampling.greedy == 0 and sampling.ends == (end,)
    texts = {tokenizer.decode(turn[:-1], skip_special_tokens=True).strip() for turn in turns[1:]} - {""}
    assert len(texts) > 6 and {origin for origin, _ in found} == texts
    assert len(found) == 2 * len(texts)
    for origin, ids in found:
        prompt = chat_tokens(tokenizer, [{"role": "user", "content": origin}], ask=True)
        assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
