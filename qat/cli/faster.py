"""Composing in half the time: what Hydra and OmegaConf do over and over is done once, or not at all.

A sweep composes every job twice, and Hydra composes a launch once more before it begins, for the one value
`hydra.mode`. A third of composing is copying what describes each node, types and a few switches, attribute by
attribute; a fifth is collecting, for each file, the options chosen so far, which only names with `${…}` in a defaults
list ask for.
"""

import copy
from collections import defaultdict
from typing import Any

from hydra._internal import defaults_list as listing
from hydra._internal.hydra import Hydra
from hydra.core.default_element import InputDefault
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, nodes
from omegaconf.base import Node

from qat.config import CONF

SINGLE = nodes.ValueNode.__subclasses__()
OURS = ("pkg://hydra.conf", f"file://{CONF}", str(CONF), "structured://")
collected, composed_mode = listing._create_interpolation_map, Hydra.get_mode


def register() -> None:
    """Has Hydra and OmegaConf work in this way."""
    Hydra.get_mode = _mode  # type: ignore[assignment, method-assign]
    listing._create_interpolation_map = _known_choices
    for kind in (DictConfig, ListConfig, *SINGLE):
        kind.__deepcopy__ = _copied  # type: ignore[attr-defined]


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """What `hydra.mode` is; nothing in `conf/` sets it, so it is composed where a word or a file of one's own may."""
    folders = {path.path for path in hydra.config_loader.get_search_path().get_path()}
    if folders <= set(OURS) and not any("hydra" in text for text in overrides if not text.startswith("hydra.run.dir=")):
        return None
    mode: RunMode | None = composed_mode(hydra, config_name, overrides)
    return mode


def _known_choices(overrides: listing.Overrides, defaults_list: list[InputDefault], self_added: bool) -> DictConfig:
    """What the names in a defaults list are looked up in; nothing where all of them are plain."""
    if any(one.is_interpolation() for one in defaults_list):
        return collected(overrides, defaults_list, self_added)
    return OmegaConf.create()


def _copied(node: Node, memo: dict[int, Any]) -> Node:
    """As OmegaConf copies a node: content and description are new, values are shared, the parent is the same."""
    made = _like(node)
    state = vars(made)
    state["_metadata"] = said = _like(state["_metadata"])
    said.flags, said.resolver_cache = copy.copy(said.flags), _cached(said.resolver_cache)
    state["_flags_cache"] = None
    content = state.get("_content")
    if isinstance(content, dict):
        state["_content"] = {key: _within(made, value, memo) for key, value in content.items()}
    elif isinstance(content, list):
        state["_content"] = [_within(made, value, memo) for value in content]
    return made


def _like(one: Any) -> Any:
    """Another of its class, with the same attributes."""
    made = object.__new__(type(one))
    vars(made).update(vars(one))
    return made


def _within(parent: Node, node: Node, memo: dict[int, Any]) -> Node:
    """The copy of a node in a copy of its parent."""
    made = copy.deepcopy(node, memo)
    vars(made)["_parent"] = parent
    return made


def _cached(resolved: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(resolved) if resolved else defaultdict(dict)
