"""What is composed faster is what Hydra and OmegaConf compose by themselves."""

import copy
from enum import Enum
from pathlib import Path

import pytest
from hydra._internal import defaults_list
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.base import Node

from qat.cli import arguments, faster, main
from qat.config import CONF

OWN = {kind: kind.__deepcopy__ for kind in (DictConfig, ListConfig, *faster.SINGLE)}  # before any composer
OWN_CHOICES = faster.collected


class Colour(Enum):
    """A type that OmegaConf has a node for."""

    red = 1


VALUES = st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=3))
LEAVES = st.one_of(VALUES, st.sampled_from([Colour.red, Path("a"), b"b", "${x}", "???"]))
TREES = st.recursive(
    LEAVES, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from("abx"), inside), max_leaves=12
)


@pytest.fixture(autouse=True)
def fast():
    """As launches compose, whatever ran before."""
    faster.register()


def by_omegaconf(config):
    with pytest.MonkeyPatch.context() as patch:
        for kind, own in OWN.items():
            patch.setattr(kind, "__deepcopy__", own)
        return copy.deepcopy(config)


def told(node: Node):
    """Everything that a node is, without its parent and what it remembers of flags."""
    state = {name: value for name, value in vars(node).items() if name not in ("_parent", "_flags_cache")}
    content = state.pop("_content", None)
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    assert all(vars(child)["_parent"] is node for child in inside)
    keys = list(content) if isinstance(content, dict) else content if isinstance(content, str) else None
    return type(node), state, keys, [told(child) for child in inside]


def nodes_of(node: Node):
    content = vars(node).get("_content")
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    yield node
    for child in inside:
        yield from nodes_of(child)


@given(TREES.filter(lambda tree: isinstance(tree, dict | list)), st.booleans())
def test_any_tree(tree, struct):
    config = OmegaConf.create({"x": 1, "tree": tree})
    OmegaConf.set_struct(config, struct)
    with flag_override(config, "readonly", True):
        copied = copy.deepcopy(config.tree)
        assert told(copied) == told(by_omegaconf(config.tree))
        assert vars(copied)["_parent"] is config
    assert not {id(node) for node in nodes_of(copied)} & {id(node) for node in nodes_of(config)}


def test_a_whole_composition(here):
    composed = main.Composer(arguments.parse([]).flags).compose(["+debug=tiny", "train.lr=1e-3"])
    copied = copy.deepcopy(composed)
    assert told(copied) == told(by_omegaconf(composed))
    copied.train.lr, copied.quant.mlp = 2e-3, None
    assert composed.train.lr == 1e-3 and composed.quant.mlp is not None
    OmegaConf.set_readonly(copied, True)
    assert not OmegaConf.is_readonly(composed)


@pytest.mark.parametrize("named", ["${quant}", "q2a4"])
def test_names_in_a_defaults_list_know_the_options_chosen_before(here, named):
    (mine := here / "mine" / "colour").mkdir(parents=True)
    (mine / "q2a4.yaml").write_text("# @package run\ngoal: two\n")
    (mine / "q4a4.yaml").write_text("# @package run\ngoal: four\n")
    (here / "mine" / "config.yaml").write_text(
        f"defaults:\n  - schema\n  - quant: q4a4\n  - colour: {named}\n  - _self_\nrun: {{}}\n"
    )
    composer = main.Composer(arguments.parse(["--config-path", str(here / "mine")]).flags)
    assert composer.compose([]).run.goal == {"${quant}": "four", "q2a4": "two"}[named]
    found = OmegaConf.to_container(composer.compose(["quant=q2a4"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults_list, "_create_interpolation_map", OWN_CHOICES)
        assert OmegaConf.to_container(composer.compose(["quant=q2a4"])) == found


@pytest.mark.parametrize(
    ("words", "composed"),
    [
        (["+debug=tiny"], 0),
        (["+debug=tiny", "hydra.run.dir=x"], 0),
        (["-m", "seed=1,2"], 0),
        (["hydra.mode=RUN"], 1),
        (["hydra={mode:RUN}"], 1),
        (["--config-dir", "{here}/mine"], 1),
        (["--config-path", "{here}/mine"], 1),
    ],
)
def test_the_mode_is_composed_where_it_may_be_set(here, monkeypatch, words, composed):
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    (here / "mine").mkdir()
    (here / "mine" / "config.yaml").write_text("defaults:\n  - schema\n  - hydra/job_logging: default\n")
    command, asked = arguments.parse([word.replace("{here}", str(here)) for word in words]), []
    composer = main.Composer(command.flags)
    monkeypatch.setattr(faster, "composed_mode", lambda *told: asked.append(told))
    try:
        hydra = Hydra.create_main_hydra2("launch", composer.loader.config_search_path)
        assert hydra.get_mode(config_name=composer.name, overrides=command.overrides) is None
    finally:
        GlobalHydra.instance().clear()
    assert len(asked) == composed


def test_no_option_of_ours_sets_the_mode(here):
    for file in CONF.rglob("*.yaml"):
        said = OmegaConf.load(file)
        assert isinstance(said, ListConfig) or "mode" not in (said.get("hydra") or {}), file
        assert "hydra" not in file.relative_to(CONF).parts[:1] or "mode" not in said
