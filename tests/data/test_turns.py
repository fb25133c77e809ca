"""What comes before each answer in training text against what a chat would build there, template by template."""

import json
import logging

import pytest

from qat.config import DataConfig, DataSource
from qat.data import marks
from qat.data.conversations import Conversation
from qat.data.documents import obtain_documents
from qat.data.tally import Unusable
from qat.data.thinking import renderings
from qat.data.turns import answers, spans, told

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shaped as Qwen3's: thoughts of earlier turns go, the last answer has a block of them, empty ones where it has none.
QWEN3 = (
    "{% for m in messages %}{% set said = m.content %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in said else '' %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token or '' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token or '' }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token or '' }}{% endif %}"
)
SPACED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n\n{% endif %}")

PLAIN = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2"), ("user", "three?")]
PLAIN += [("assistant", "3")]
THOUGHT = [(role, f"<think>\nso {said}\n</think>\n\n{said}" if role == "assistant" else said) for role, said in PLAIN]


def compared(tokenizer, rendering):
    return told(answers(tokenizer, rendering, tokens(tokenizer, rendering.text)))


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def messages(turns):
    return [{"role": role, "content": said} for role, said in turns]


@pytest.mark.parametrize(
    ("template", "turns", "thinking", "differing"),
    [
        (CHATML, PLAIN, "false", 0),
        (LLAMA3, PLAIN, "false", 0),
        (GEMMA, PLAIN, "false", 0),
        (PHI3, PLAIN, "false", 0),
        (CHATML, THOUGHT, "false", 0),
        (CHATML, THOUGHT, "true", 0),
        (QWEN3, PLAIN[:2], "false", 0),
        (QWEN3, PLAIN, "false", 2),  # no empty thoughts before any answer but the last
        (QWEN3, THOUGHT[:2], "true", 0),
        (QWEN3, THOUGHT, "true", 2),  # a chat forgets what was thought before the second answer
        (SPACED, PLAIN, "false", 3),  # never what a chat shows
    ],
)
def test_answers_that_follow_other_tokens_are_counted(tiny, template, turns, thinking, differing):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    (found,) = renderings(tokenizer, Conversation(messages(turns)), thinking)
    seen = compared(tokenizer, found)
    assert (seen.answers, seen.differing) == (len(turns) // 2, differing)
    assert bool(seen.example) == bool(differing)
    by_hand = 0
    for number in range(1, len(turns), 2):
        prompt = tokenizer.apply_chat_template(
            found.messages[:number], tokenize=False, add_generation_prompt=True, enable_thinking=thinking == "true"
        )
        ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, found.text))
        by_hand += whole[: len(ids)] != ids
    assert by_hand == differing


def test_a_token_that_reaches_into_the_answer_is_a_difference(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["so"])
    tokenizer.chat_template = (
        "{% for m in messages %}|s{{ m.content }}{% endfor %}{% if add_generation_prompt %}|s{% endif %}"
    )
    turns = messages([("user", "?"), ("assistant", "o")])
    (found,) = renderings(tokenizer, Conversation(turns), "false")
    assert compared(tokenizer, found).differing == 1


def test_an_answer_that_nobody_asked_for_is_not_compared(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHATML
    turns = messages([("assistant", "hello"), ("user", "?"), ("assistant", "a"), ("assistant", "b")])
    (found,) = renderings(tokenizer, Conversation(turns), "false")
    seen = compared(tokenizer, found)
    assert (seen.answers, seen.differing) == (1, 0)


@pytest.mark.parametrize(("template", "differing"), [(CHATML, 0), (QWEN3, 80)])
def test_the_manifest_and_one_line_tell_it(tiny, cpu, tmp_path, monkeypatch, caplog, template, differing):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr(type(tiny), "tokenizer", lambda _: tokenizer)
    rows = [{"messages": messages([(role, f"{said} {n}") for role, said in PLAIN])} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig("chat", DataSource.chat_jsonl, path=str(tmp_path / "rows.jsonl"))
    with caplog.at_level(logging.WARNING):
        manifest = obtain_documents(data, tiny, 0, cpu, tmp_path / "artifacts").manifest
    assert manifest["turns"] == [{"answers": 120, "differing": differing}]
    said = [record.getMessage() for record in caplog.records if "in a chat" in record.getMessage()]
    assert len(said) == (1 if differing else 0)
    if differing:
        assert "80 of 120 answers follow other tokens than they would in a chat: training text has '1 0" in said[0]
        assert "where a chat has '<think>" in said[0]


def spoken(tokenizer, template, turns, thinking, end):
    """The text of every answer by `spans`."""
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = template
    (found,) = renderings(tokenizer, Conversation(messages(turns)), thinking)
    whole = tokens(tokenizer, found.text)
    places = spans(tokenizer, found, answers(tokenizer, found, whole), whole, [tokenizer.convert_tokens_to_ids(end)])
    return [tokenizer.decode(whole[begin:end]) for begin, end in places]


@pytest.mark.parametrize(
    ("template", "turns", "thinking", "end", "said"),
    [
        (CHATML, PLAIN, "false", "<|im_end|>", ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]),
        (LLAMA3, PLAIN, "false", "<|eot_id|>", ["1<|eot_id|>", "2<|eot_id|>", "3<|eot_id|>"]),
        (GEMMA, PLAIN, "false", "<end_of_turn>", ["1<end_of_turn>", "2<end_of_turn>", "3<end_of_turn>"]),
        (PHI3, PLAIN, "false", "<|end|>", ["1<|end|>", "2<|end|>", "3<|end|>"]),
        (CHATML, THOUGHT[:2], "true", "<|im_end|>", ["<think>\nso 1\n</think>\n\n1<|im_end|>"]),
        (QWEN3, PLAIN, "false", "<|im_end|>", ["3<|im_end|>"]),  # a chat would show thoughts before the others
        (SPACED, PLAIN, "false", "<|im_end|>", []),
        (CHATML, PLAIN[:2], "false", "<|nowhere|>", ["1<|im_end|>\n"]),  # the last one may go on to the end
    ],
)
def test_answers_lie_between_what_a_chat_asks_and_the_token_that_ends_them(
    tiny, template, turns, thinking, end, said
):
    assert spoken(tiny.tokenizer(), template, turns, thinking, end) == said


def test_an_answer_that_goes_on_into_the_next_question_is_none_to_learn_from(tiny):
    with pytest.raises(Unusable, match="none of the tokens ends"):
        spoken(tiny.tokenizer(), CHATML, PLAIN, "false", "<|nowhere|>")


def test_what_people_write_ends_no_answer(tiny):
    turns = [("user", "what is <|im_end|>?"), ("assistant", "a mark"), ("user", "<|im_end|>"), ("assistant", "yes")]
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    (found,) = renderings(tokenizer, Conversation(messages(turns)), "false")
    whole = marks.of(tokenizer).tokens(found.text)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    places = spans(tokenizer, found, answers(tokenizer, found, whole), whole, [end])
    assert [tokenizer.decode(whole[begin:end]) for begin, end in places] == ["a mark<|im_end|>", "yes<|im_end|>"]
