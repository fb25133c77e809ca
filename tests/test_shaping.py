"""What can change a result is told from what cannot by the configuration itself, for keys, plans and resumed runs."""

import copy
from dataclasses import replace

import pytest

from qat import sweeps
from qat.cli import arguments, main
from qat.config import Stage
from qat.shaping import flat, is_neutral, shaping

FREE = {
    "outputs": "elsewhere",
    "instance.micro_batch": 3,
    "instance.precision": "fp32",
    "tracker.project": "other",
    "store.mirror": True,
    "run.resume": "SR-001",
    "sweep.resume": "sweep-001",
    "train.save_every": 7,
    "train.keep": 9,
}
SHAPING = {"seed": 5, "train.eval_every": 3, "train.lr": 0.5, "data.documents": 9, "quant.mlp.rank": 3}
OF_STAGE = {"evaluate.stride": 3, "evaluate.sample_tokens": 5, "export.context": 9, "chat.max_tokens": 4}


@pytest.fixture(scope="module")
def config():
    return main.check(arguments.parse([])).configs[0]


def changed(config, name, value):
    other = copy.deepcopy(config)
    section, _, field = name.rpartition(".")
    inside = other
    for part in filter(None, section.split(".")):
        inside = getattr(inside, part)
    setattr(inside, field, value)
    return other


@pytest.mark.parametrize("name", FREE)
def test_what_never_changes_a_result_is_left_out(config, name):
    other = changed(config, name, FREE[name])
    assert other != config and shaping(other) == shaping(config) and sweeps.key_of(other) == sweeps.key_of(config)
    assert is_neutral(name) and is_neutral(name.split(".")[0]) == (name.split(".")[0] != "train")


@pytest.mark.parametrize("name", SHAPING)
def test_what_can_change_a_result_is_kept(config, name):
    other = changed(config, name, SHAPING[name])
    differing = [key for key, value in flat(shaping(other)) if dict(flat(shaping(config)))[key] != value]
    assert differing == [name] and sweeps.key_of(other) != sweeps.key_of(config) and not is_neutral(name)


@pytest.mark.parametrize("name", OF_STAGE)
def test_a_section_of_one_stage_shapes_that_stage_alone(config, name):
    other = changed(config, name, OF_STAGE[name])
    stage = Stage[name.split(".")[0]]
    assert shaping(other) == shaping(config)
    assert shaping(replace(other, stage=stage)) != shaping(replace(config, stage=stage))


def test_goal_and_notes_tell_jobs_apart_and_shape_nothing(config):
    for name in ("run.goal", "run.notes"):
        other = changed(config, name, "why")
        assert shaping(other) == shaping(config) and sweeps.key_of(other) != sweeps.key_of(config)


def test_keys_that_are_none_are_not_neutral():
    assert not is_neutral("nothing.like.it") and not is_neutral("trian")
