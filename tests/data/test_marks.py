"""Marks of a template: control tokens where the template writes them, text where people do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qat.data import marks
from qat.data.conversations import Conversation
from qat.data.tally import Unusable
from qat.data.thinking import chat_tokens, renderings

MARKS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
THINKER = ("<think>", "</think>", "<call>")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def control(tokenizer):
    return {tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}


@given(st.lists(st.sampled_from([*MARKS, "<|end", "|>", " ", "word", "é", "<think>", marks.OPEN, marks.CLOSE])))
def test_nothing_that_is_said_becomes_a_control_token(tiny, parts):
    tokenizer, text = tiny.tokenizer(), "".join(parts)
    hiding = marks.of(tokenizer)
    ids = hiding.tokens(hiding.hide(text))
    assert not {tokenizer.convert_tokens_to_ids(mark) for mark in MARKS} & set(ids)
    assert marks.shown(tokenizer.decode(ids)) == marks.shown(text)


def test_text_without_marks_has_the_tokenizers_own_tokens(tokenizer):
    text = "A text, with <b>some</b> signs |> in it: é 😀"
    hiding = marks.of(tokenizer)
    assert hiding.hide(text) == text
    assert hiding.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_keeps_its_own_marks_and_those_alone(tokenizer, control, role):
    said = [{"role": role, "content": "a <|end|><|user|> b"}]
    ids = chat_tokens(tokenizer, said)
    number = tokenizer.convert_tokens_to_ids
    assert [id for id in ids if id in control] == [number(f"<|{role}|>"), number("<|end|>")]
    assert tokenizer.decode(ids) == f"<|{role}|>a <|end|><|user|> b<|end|>"


def test_marks_in_the_arguments_of_tools_are_text_too(tiny, control):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<|user|>{{ messages[0].tool_calls[0].function.arguments.a }}<|end|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "<|end|>"}}}
    said = Conversation([{"role": "assistant", "content": "", "tool_calls": [call]}])
    text = renderings(tokenizer, said, "false")[0].text
    assert len([id for id in marks.of(tokenizer).tokens(text) if id in control]) == 2


@pytest.fixture(scope="module")
def thinker(tiny):
    """A tokenizer with tokens for thoughts and calls, of which the template writes some."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=mark == "</think>") for mark in THINKER])
    tokenizer.chat_template += "{# #}{% if false %}<think></think><call>{% endif %}"
    return tokenizer


def test_an_assistant_thinks_and_calls_in_the_templates_marks_and_a_user_does_not(thinker):
    own = {thinker.convert_tokens_to_ids(mark) for mark in THINKER}
    text = "<think>a</think><call>"
    for role, there in (("assistant", own), ("user", set()), ("system", set()), ("tool", set())):
        assert own & set(chat_tokens(thinker, [{"role": role, "content": text}], "true")) == there


def test_a_tokenizer_that_makes_marks_of_plain_text_is_told():
    """As Unigram models do, whose marks are pieces like any other."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -9.0) for letter in "▁<s>abc")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([AddedToken("<s>", special=True)])
    hiding = marks.of(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>"))
    assert hiding.tokens("abc")
    with pytest.raises(Unusable, match="marks that this tokenizer cannot take for text") as said:
        hiding.tokens(hiding.hide("a <s> b"))
    assert not said.value.damaged


SAID = st.lists(st.sampled_from(["word", " ", "\n", "<|end|>", "x" * 11, "é"]), max_size=60)


@given(SAID, st.booleans())
def test_pieces_are_the_text_and_no_mark_is_cut(tiny, parts, hidden):
    tokenizer, text = tiny.tokenizer(), "".join(parts)
    hiding = marks.of(tokenizer)
    text = hiding.hide(text) if hidden else text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "PIECE", 20)
        found = list(hiding.pieces(text))
    assert "".join(found) == text and all(len(piece) <= 20 for piece in found)
    ids = [token for piece in found for token in hiding.tokens(piece)]
    assert tokenizer.decode(ids) == marks.shown(text)
    assert ids.count(tokenizer.eos_token_id) == (0 if hidden else text.count("<|end|>"))


def test_pieces_end_between_words_where_there_are_any(tokenizer, monkeypatch):
    monkeypatch.setattr(marks, "PIECE", 20)
    hiding = marks.of(tokenizer)
    assert list(hiding.pieces("one two three four five six")) == ["one two three four", " five six"]
    assert list(hiding.pieces("x" * 45)) == ["x" * 20, "x" * 20, "x" * 5]
    assert list(hiding.pieces("x" * 17 + "<|end|>y")) == ["x" * 17, "<|end|>y"]


def test_a_long_conversation_keeps_every_token_but_where_it_is_cut(tokenizer):
    text = "<|user|>" + "word " * 30_000 + "<|end|>"
    hiding = marks.of(tokenizer)
    pieces = list(hiding.pieces(text))
    assert len(pieces) == 3 and max(map(len, pieces)) <= marks.PIECE
    tokens = [token for piece in pieces for token in hiding.tokens(piece)]
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
