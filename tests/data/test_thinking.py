"""Thinking modes of conversations that exist: stripped for the one variant, whole for the other."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.data import marks
from qat.data.conversations import Conversation
from qat.data.tally import Unusable
from qat.data.thinking import _apart, chat_tokens, renderings
from qat.errors import ConfigError

IGNORES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
# As Qwen3's: thoughts of earlier turns are dropped, and a last answer without one gets an empty block.
DROPS = (
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts|length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip() if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
)
HEEDS = "{{ 'on' if enable_thinking else 'off' }}" + IGNORES

TURNS = [
    {"role": "user", "content": "q <think>mine</think>"},
    {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\none"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "<think>second</think> two"},
]


@pytest.fixture
def shown(tiny):
    """The renderings of a conversation through a template, as their tokens decode."""

    def make(template, messages, thinking="false", tools=()):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        found = renderings(tokenizer, Conversation(messages, list(tools)), thinking)
        return [tokenizer.decode(marks.of(tokenizer).tokens(one.text)) for one in found]

    return make


def test_template_that_ignores_the_switch(shown):
    plain = "<|user|>q <think>mine</think><|end|><|assistant|>one<|end|><|user|>r<|end|><|assistant|>two<|end|>"
    whole = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in TURNS)
    assert shown(IGNORES, TURNS, "false") == [plain]
    assert shown(IGNORES, TURNS, "true") == [whole]
    assert shown(IGNORES, TURNS, "both") == [plain, whole]


def test_template_that_drops_thoughts(shown):
    (plain,), (whole,) = (shown(DROPS, TURNS, mode) for mode in ("false", "true"))
    assert "first thought" not in plain and "second" not in plain and plain.count("<think>\n\n</think>") == 1
    assert "<|assistant|><think>\nfirst thought\n</think>\n\none<|end|>" in whole
    assert "<|assistant|><think>second</think> two<|end|>" in whole
    assert whole.count("<think>") == 3  # the question's own, and one for each answer


def test_a_thought_that_the_template_keeps_is_left_in_its_form(shown):
    (whole,) = shown(DROPS, TURNS[2:], "true")
    assert whole == "<|user|>r<|end|><|assistant|><think>\nsecond\n</think>\n\ntwo<|end|>"


def test_answers_without_thoughts_come_once_where_the_modes_are_the_same(shown):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert shown(IGNORES, turns, "both") == ["<|user|>q<|end|><|assistant|>a<|end|>"]
    assert [text[:3].strip("<") for text in shown(HEEDS, turns, "both")] == ["off", "on"]


def test_a_model_without_a_template_says_what_to_use(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template: use data=tokens, openings or text"):
        chat_tokens(tokenizer, TURNS)


def test_a_template_that_refuses_is_one_sentence(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"refuses a conversation .roles must alternate"):
        chat_tokens(tokenizer, TURNS)


def test_an_answer_that_was_all_thought_is_no_answer_without_it(shown):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>\n"}]
    assert shown(IGNORES, turns, "both") == ["<|user|>q<|end|><|assistant|><think>hm</think>\n<|end|>"]
    with pytest.raises(Unusable, match="an empty answer"):
        shown(IGNORES, turns, "false")


# As Hermes' and Qwen's.
TOOLS = (
    "{% if tools %}<|system|>{{ tools | map('tojson') | join }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
)
CALLED = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]


def test_calls_of_tools_are_rendered_as_the_template_says(shown):
    said = '<call>{"name": "f", "arguments": {"a": 1}}</call>'
    rest = f"<|user|>q<|end|><|assistant|>{said}<|end|><|tool|>r<|end|><|assistant|>a<|end|>"
    assert shown(TOOLS, CALLED, "both", [{"name": "f"}]) == [f'<|system|>{{"name": "f"}}<|end|>{rest}']


def test_calls_that_the_template_passes_over_are_no_empty_answer(shown):
    with pytest.raises(Unusable, match="calls of tools, which the chat template does not show") as said:
        shown(IGNORES, CALLED)
    assert not said.value.damaged


@pytest.mark.parametrize("role", ["system", "tool"])
def test_messages_that_the_template_passes_over_are_told(shown, role):
    known = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }} {% endfor %}"
    turns = [{"role": role, "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(Unusable, match=f"messages of the role {role}, which the chat template does not show"):
        shown(known, turns)
    assert shown(known, turns[1:]) == ["q a "]
    assert shown("{% for m in messages %}{{ m.content | upper }} {% endfor %}", turns) == ["S Q A "]  # in other words


def test_a_developer_is_a_system_where_the_template_has_none(shown):
    turns = [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}]
    assert shown(IGNORES, turns) == ["<|system|>s<|end|><|user|>q<|end|>"]
    knows = "{% if messages[0].role == 'developer' %}D {% endif %}" + IGNORES
    assert shown(knows, turns) == ["D <|developer|>s<|end|><|user|>q<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not so') }}",
        "{{ messages[0].content + none }}",
        "{{ messages[9].content.x }}",
        "{{ messages[0].content | int('x') / 0 }}",
        "{{ '' | nothing }}",
    ],
)
def test_whatever_a_template_raises_is_a_refusal(shown, template):
    with pytest.raises(Unusable, match="refused by the chat template"):
        shown(template, [{"role": "user", "content": "q"}])


BLOCK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)


@given(st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "a", "<"])))
def test_thoughts_are_what_stands_between_their_marks(parts):
    said = "".join(parts)
    assert _apart(said) == (BLOCK.sub("", said), BLOCK.findall(said))


def test_thoughts_without_end_take_no_time():
    """A search for the end of each would go through 1.4 MB 200,000 times."""
    said = "</think>" + "<think>" * 200_000
    assert _apart(said) == (said, [])
