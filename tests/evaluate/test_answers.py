"""Answers appear token by token, and whole."""

import io

import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.evaluate.answers import Stream, settings_of, stream
from tests import tiny

PROMPT = torch.tensor([[1, 2, 3]])


def pieces(tokenizer, ids):
    """What is newly written after each token, and at the end."""
    file = io.StringIO()
    written = Stream(tokenizer, file)
    written.put(PROMPT)
    seen = [file.getvalue()]
    for token in ids:
        written.put(torch.tensor([token]))
        seen.append(file.getvalue())
    written.end()
    seen.append(file.getvalue())
    return [after.removeprefix(before) for before, after in zip(["", *seen], seen, strict=False)]


def test_every_token_shows_at_once(teacher):
    tokenizer = teacher.tokenizer()
    ids = tokenizer("no spaces", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids) == ["", *"no spaces", "\n"]


def test_a_character_of_several_tokens_shows_once_it_is_whole(teacher):
    tokenizer = teacher.tokenizer()
    ids = tokenizer("aé€😀b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 11
    assert [piece for piece in pieces(tokenizer, ids) if piece] == [*"aé€😀b", "\n"]


@given(st.text(max_size=30))
def test_what_was_written_is_the_text(teacher, text):
    tokenizer = teacher.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_hold_nothing_back_for_long(teacher, ids):
    shown = pieces(teacher.tokenizer(), ids)
    assert all("".join(shown[i : i + 4]) for i in range(1, len(ids) - 3))


def test_the_streamed_answer_is_the_likeliest_tokens(teacher):
    model, tokenizer, file = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer(), io.StringIO()
    ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    answer = stream(model, tokenizer, ids, settings_of(tokenizer, teacher.ends(), 6), file)
    written = []
    for _ in range(6):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    assert answer == tokenizer.decode(written, skip_special_tokens=True)
    assert file.getvalue() == answer + "\n"
