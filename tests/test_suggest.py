"""The nearest word, also from its beginning or from what it does."""

from qat.suggest import did_you_mean, named, nearest

STAGES = {"distill": "train a student", "evaluate": "measure a checkpoint", "chat": "talk to a checkpoint"}


def test_a_beginning_stands_for_the_word():
    assert nearest("qwen", ["smollm2_135m", "qwen3_0_6b"]) == "qwen3_0_6b"
    assert nearest("qw", ["smollm2_135m", "qwen3_0_6b"]) is None


def test_the_likeliest_of_several_beginnings():
    assert nearest("q2a4", ["q2a4_r16", "q2a4", "q2a4_r8"]) == "q2a4"


def test_a_word_for_what_it_does():
    assert named("train", STAGES) == "distill"
    assert named("Measure", STAGES) == "evaluate"
    assert named("evalute", STAGES) == "evaluate"
    assert named("sing", STAGES) is None


def test_nothing_is_said_of_nothing():
    assert did_you_mean("xyz", STAGES) == ""
