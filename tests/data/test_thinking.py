"""Thinking modes of conversations that exist: stripped for the one variant, whole for the other."""

import pytest

from qat.data.thinking import chat_tokens, renderings
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
    """The decoded renderings of a conversation through a template."""

    def make(template, messages, thinking):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        return [tokenizer.decode(tokens) for tokens in renderings(tokenizer, messages, thinking)]

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
