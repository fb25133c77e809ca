"""Which loop writes: the fast one where its logits are the model's own, else transformers', else none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from qat.errors import ConfigError
from qat.generation import OwnWriter, Sampling, Writer, answers, memory, own, settle, writer
from qat.generation import loop as loops
from qat.models import ModelFolder

END = 257
GREEDY = Sampling(tokens=20, greedy=20, temperature=1.0, ends=(END,))
PROMPTS = [[256, 72, 105], [256, *range(65, 80)], [70]]
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


def made(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def chosen(model, prompts=PROMPTS, sampling=GREEDY):
    return writer(ModelFolder("it", Path(), ""), model, prompts, sampling, len(prompts))


def said(write, prompts=PROMPTS):
    return answers(write(prompts, 0, lambda amount=1, note="": None), (END,))


def read_again(model, prompt):
    """The likeliest tokens, the whole text read anew for each of them."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + GREEDY.tokens and END not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


WINDOW = transformers.MistralConfig(**SIZES, sliding_window=8)
# Logits ten times as large would be rounded by more than two passes may differ.
SCALED = transformers.GraniteConfig(**SIZES, logits_scaling=0.5)
STATES = transformers.MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(transformers.LlamaConfig(**SIZES), Writer), (SCALED, Writer), (WINDOW, OwnWriter), (STATES, OwnWriter)],
)
def test_whichever_loop_writes_says_what_reading_all_anew_says(config, kind):
    model = made(config)
    write = chosen(model)
    assert type(write) is kind
    assert said(write) == [read_again(model, prompt) for prompt in PROMPTS]


def test_an_answer_that_ends_at_once_is_compared_all_the_same():
    model = made(transformers.LlamaConfig(**SIZES))
    ends = tuple(read_again(model, prompt)[0] for prompt in PROMPTS[1:])
    assert type(chosen(model, sampling=replace(GREEDY, ends=ends))) is Writer


def test_a_single_token_behind_a_single_one():
    model = made(transformers.LlamaConfig(**SIZES))
    write = chosen(model, [[70]], replace(GREEDY, tokens=1))
    assert type(write) is Writer and said(write, [[70]]) == [read_again(model, [70])[:1]]


def test_few_rows_say_what_many_do():
    model = made(WINDOW)
    few, many = (OwnWriter(model, replace(GREEDY, greedy=2), rows) for rows in (1, 9))
    assert said(few, PROMPTS * 3) == said(many, PROMPTS * 3)


def test_a_window_longer_than_any_text_needs_no_other_loop():
    config = transformers.MistralConfig(**SIZES, sliding_window=64)
    assert type(chosen(made(config))) is Writer
    longer = [list(range(60, 110)), [70]]
    assert type(chosen(made(config), longer)) is OwnWriter


def test_what_was_found_is_not_looked_for_again_unless_texts_get_longer(monkeypatch):
    teacher, model, looked = ModelFolder("it", Path(), ""), made(transformers.LlamaConfig(**SIZES)), []
    find = settle._Trial.find
    monkeypatch.setattr(settle._Trial, "find", lambda self: (looked.append(1), find(self))[1])
    for prompts in (PROMPTS, PROMPTS[:1], [[*range(65, 90)]]):
        writer(teacher, model, prompts, GREEDY, 3)
    assert len(looked) == 2


def forgets(q, k, v, keys, values, position, scale):
    """Attention to everything but the token before."""
    found = memory.next_token(q, k, v, keys, values, position, scale)
    rows = torch.arange(len(position))
    values[rows, :, position] = 0
    return found


def test_a_fault_in_the_fast_loop_is_found(monkeypatch):
    model = made(transformers.LlamaConfig(**SIZES))
    wanted = said(chosen(model))
    monkeypatch.setattr(
        memory, "_decode", lambda m, q, k, v, mask, scaling=None, **_: (forgets(q, k, v, *m.memory, scaling), None)
    )
    memory.AttentionInterface.register(memory.DECODE, memory._decode)
    try:
        write = chosen(model)
    finally:
        monkeypatch.undo()
        memory.AttentionInterface.register(memory.DECODE, memory._decode)
    assert type(write) is OwnWriter and said(write) == wanted


def test_without_a_loop_that_is_right_no_text_is_written(monkeypatch):
    model = made(transformers.LlamaConfig(**SIZES))
    monkeypatch.setattr(loops.OutputHead, "logits", lambda self, hidden: hidden @ torch.randn(64, 512))
    monkeypatch.setattr(own, "generate", lambda *_, **__: torch.zeros(1, 3))  # as no model chose them
    with pytest.raises(ConfigError, match=r"^it \(LlamaForCausalLM\) cannot write text: no loop says"):
        chosen(model)
