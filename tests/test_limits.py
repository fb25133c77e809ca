"""Sizes beyond the teacher's are refused with their bound, before anything is made."""

import pytest

from qat.cli import arguments, main
from qat.errors import ConfigError
from qat.export import coreml
from qat.stages import limits
from tests import tiny

TOO_MUCH = [
    ("quant.mlp.rank=65", "quant.mlp.rank=65: model.layers.0.mlp.gate_proj of tiny has 128 outputs and 64 inputs"),
    ("quant.attn.rank=33", "no rank above 32 adds anything"),
    ("quant=g2a4_g64 quant.mlp.group=48", "quant.mlp.group=48: model.layers.0.mlp.gate_proj of tiny has rows of 64"),
    (
        "quant=g2a4_g64 train.learn.scales=0",  # codebooks have a rate, and grids none of them
        "train.learn has no rate for scales: nothing would learn",
    ),
    ("+experiment=progressive model=tiny first.quant.mlp.rank=4000", "first.quant.mlp.rank=4000: "),
    ("stage=convert quant.mlp.rank=4000", "quant.mlp.rank=4000: "),
    ("cache.length=1025", "cache.length=1025: tiny is made for at most 1024 tokens"),
    ("stage=cache cache.length=2000", "at most 1024 tokens"),
    ("data.answer_tokens=2000", "data.parts[0].answer_tokens=2000: tiny is made for"),
    ("data=prompts data.answer_tokens=2000", "data.answer_tokens=2000: tiny is made for"),
    ("evaluate.sample_tokens=1025", "evaluate.sample_tokens=1025: "),
    ("stage=evaluate evaluate.text=text evaluate.context=2000 evaluate.stride=9", "evaluate.context=2000: "),
    ("stage=export export=coreml export.output=new checkpoint=here export.context=2000", "export.context=2000: "),
    ("model.vocab_size=600 cache.top_k=513", "cache.top_k=513: model=tiny has only 512 tokens"),
]
ALL_THERE_IS = [
    "quant.mlp.rank=64 quant.attn.rank=32",
    "cache.length=1024 data.answer_tokens=1024",
    "stage=evaluate evaluate.text=text evaluate.context=1024",
    "stage=export export=coreml export.output=new checkpoint=here export.context=32",
    "stage=distill checkpoint=here quant.mlp.rank=4000",  # which has its own
    "stage=export export.output=new cache.length=5000",  # which nobody reads
]


@pytest.fixture
def configured(tmp_path, monkeypatch, teacher, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coreml, "find_spec", lambda name: object())  # sizes are looked at without it
    (tmp_path / "text").write_text("words")
    tiny.checkpoint_in(tmp_path / "here", teacher, cache)
    words = ["model=tiny", "cache.top_k=8", "cache.random=8"]
    return lambda line: main.check(arguments.parse([*words, *line.split()])).configs[0]


@pytest.mark.parametrize(("line", "told"), TOO_MUCH)
def test_too_much_is_refused_with_its_bound(configured, teacher, line, told):
    with pytest.raises(ConfigError) as refused:
        limits.check(configured(line), teacher, teacher, tiny.FP32)
    assert told in str(refused.value)


@pytest.mark.parametrize("line", ALL_THERE_IS)
def test_as_much_as_there_is_is_let_through(configured, teacher, line):
    limits.check(configured(line), teacher, teacher, tiny.FP32)


def test_chat_asks_for_no_more_than_the_model_was_made_for(configured, teacher):
    with pytest.raises(ConfigError, match=r"chat.max_tokens=2000: tiny is made for at most 1024"):
        limits.check_lengths(configured("stage=chat chat.prompt=hi chat.max_tokens=2000"), teacher, teacher)
