"""What people type and Hydra would not take: 1e3 steps, a path for a checkpoint, a bare false."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qat.cli import arguments, main, overrides
from qat.cli.compose import Composer
from qat.suggest import nearest


def swept(*argv):
    """The overrides of each job of a sweep."""
    command = arguments.parse(["-m", *argv])
    parsed = main.check(command).parsed
    return list(overrides.jobs(parsed))


@pytest.mark.parametrize("written", ["1e3", "1.0E+3"])
def test_exponents_for_whole_numbers(written, compose):
    assert compose(f"train.steps={written}").train.steps == 1000


def test_exponents_within_sweeps(here):
    assert swept("train.steps=1e2,1e3") == [["train.steps=100"], ["train.steps=1000"]]
    assert swept("train.steps=choice(1e1,20)") == [["train.steps=10"], ["train.steps=20"]]


def test_exponents_elsewhere_are_left_alone(compose):
    config = compose("train.lr=1e-4", "cache.sequences=2.5e2")
    assert (config.train.lr, config.cache.sequences) == (1e-4, 250)


@pytest.mark.parametrize("thinking", ["false", "both", "'true'"])
def test_thinking_takes_booleans(thinking, compose):
    assert compose(f"data.thinking={thinking}").data.thinking == thinking.strip("'").lower()


@pytest.mark.parametrize("folder", ["plain", "a=b", "with space", "it's", "a,b", "x (1)", "$HOME", "${x}", "007"])
def test_checkpoint_path(folder, compose, checkpoint):
    checkpoint(folder)
    config = compose("stage=evaluate", f"checkpoint={folder}")
    assert (config.checkpoint.name, config.checkpoint.path) == ("local", folder)


def test_checkpoint_of_a_run(compose, checkpoint, here):
    best = checkpoint("elsewhere/SR-007/checkpoints/best")
    for written in ("checkpoint=SR-007", f"checkpoint={best.parents[1]}", f"checkpoint={best}"):
        config = compose("stage=chat", "outputs=elsewhere", written)
        assert (here / config.checkpoint.path).resolve() == best


def test_checkpoint_sweeps(here, checkpoint):
    checkpoint("a=1"), checkpoint("b c")
    jobs = swept("checkpoint='a=1','b c'")
    assert [job[1] for job in jobs] == ["checkpoint.path='a=1'", "checkpoint.path='b c'"]
    assert [job[0] for job in swept("checkpoint=teacher,q4_fp32")] == [
        "checkpoint=teacher",
        "checkpoint=q4_fp32",
    ]


@pytest.mark.parametrize("word", ["here/cache", "here/cache.tgz", "alpaca_chat_think_both_L64_K64_R128", "Alpaca_L64"])
def test_cache_by_path_or_name(word, compose, here):
    (here / "here" / "cache").mkdir(parents=True)
    (here / "here" / "cache.tgz").touch()
    config = compose("stage=cache", f"cache={word}")
    assert (config.cache.name, config.cache.path) == ("local", word)


def test_a_sweep_may_mix_names_and_paths(here, checkpoint):
    checkpoint("outputs/SR-007/checkpoints/best")
    command = arguments.parse(["-m", "checkpoint=teacher,SR-007,q4_fp32,./outputs/SR-007"])
    best = "outputs/SR-007/checkpoints/best"
    found = [(config.checkpoint.name, config.checkpoint.path) for config in main.check(command).configs]
    assert found == [("teacher", None), ("local", best), ("local", "q4_fp32"), ("local", f"./{best}")]


def test_sweep_is_every_combination(here):
    assert len(swept("train.lr=1e-4,3e-4,1e-3", "quant=q2a4,q4a4")) == 6
    assert [job[0] for job in swept("quant=glob(q4*)")] == ["quant=q4a4", "quant=q4a4_r32"]


@pytest.mark.parametrize("written", ["+train.lr=0.5", "++train.lr=0.5", "train={lr:0.5}"])
def test_ways_to_set_a_key(written, compose):
    assert compose(written).train.lr == 0.5


@pytest.mark.parametrize(
    "words",
    [
        ["first.quant=q4a4", "first.mode=e2e", "first.train.steps=3"],
        ["+quant@first.quant=q4a4", "+mode@first.mode=e2e", "first.train.steps=3"],
        ["+experiment=progressive", "first.train.steps=3"],
        ["experiment=progressive", "first.quant=q4a4", "first.mode=e2e", "first.train.steps=3"],
    ],
)
def test_options_of_the_student_that_is_trained_first(words, compose):
    first = compose(*words).first
    assert (first.quant.name, first.quant.mlp.bits, first.mode.name, first.mode.attn) == ("q4a4", 4, "e2e", True)
    assert first.train.steps == 3


def test_flags_anywhere(here):
    command = arguments.parse(["train.lr=1", "-m", "seed=1,2"])
    assert command.argv() == ["--multirun", "train.lr=1", "seed=1,2"]


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=12))
@example(r"a\${oc.env:HOME}")
@example(r"\\${oc.env:HOME}'\\")
def test_quote_keeps_any_text(text):
    parsed = OverridesParser.create().parse_override(f"key={arguments.quote(text)}")
    assert OmegaConf.create({"key": parsed.value()})["key"] == text


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("TRAIN.LR", "train.lr"),
        ("quantt", "quant"),
        ("zzzz", None),
    ],
)
def test_nearest(word, found):
    assert nearest(word, ["train.lr", "quant", "train.steps"]) == found


def test_options_are_those_of_conf(here):
    assert "schema" not in Composer({}).options("quant")


@pytest.mark.parametrize("text", ["~/my-model", "it's", "a==1.0", "[a", "x (1)", "a)b", "${"])
def test_text_needs_no_grammar(text, compose):
    assert compose(f"model.package={text}").model.package == text


@pytest.mark.parametrize("text", ["Hello, who are you?", "a,b", "it's (not), is it", "choice(1, 2)"])
def test_sentences_may_have_commas(text, compose):
    config = compose(f"chat.prompt={text}", f"run.goal={text}")
    assert (config.chat.prompt, config.run.goal) == (text, text)


def test_sentences_of_a_sweep_are_values(here):
    assert swept("run.goal=a,b") == [["run.goal=a"], ["run.goal=b"]]


def test_home_of_outputs(compose, sealed):
    assert compose("outputs=~/results").outputs == f"{sealed}/results"
