"""Hydra's own work on the same words, done once: how they are read, what a file says, the list of defaults, the whole.

That is most of the time that a command line takes, and a test of one seldom is about it. Options of somebody's own,
other schemas, recorded runs (all under one name) and whatever is refused go Hydra's way each time, and so does all in
interpreters that start afresh.
"""

import pickle
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core import utils
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import InputDefault
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.config import CONF
from qat.identities import RESOLVED

SOURCES = {"pkg://hydra.conf", f"file://{CONF}", "structured://"}
SCHEMAS = ConfigStore.instance().repo

_create = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list
_load = ConfigRepository.load_config
_choices = defaults_list._create_interpolation_map
_resolve = InputDefault._resolve_interpolation_impl
_parse = OverridesParser.parse_rule
_lists: dict[Any, DefaultsList] = {}
_trees: dict[Any, bytes] = {}
_files: dict[str, bytes] = {}
_parsed: dict[Any, bytes] = {}


def once() -> None:
    """From now on this process, and those that it forks, do it once."""
    config_loader_impl.create_defaults_list = _listed
    ConfigLoaderImpl._compose_config_from_defaults_list = _composed  # type: ignore[method-assign]
    ConfigRepository.load_config = _loaded  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = partial(partial, _choices)  # made where a default refers to others
    InputDefault._resolve_interpolation_impl = _resolved  # type: ignore[method-assign]
    OverridesParser.parse_rule = _read  # type: ignore[method-assign]
    utils._save_config = _begin


def _listed(repo: Any, config_name: str | None, overrides_list: list[Any], **how: bool) -> DefaultsList:
    if config_name == RESOLVED or not _is_ours(repo):
        return _create(repo, config_name, overrides_list, **how)
    given = Overrides(repo, overrides_list)
    choices = [one for one in overrides_list if one not in given.config_overrides and not one.is_sweep_override()]
    key = config_name, *(one.input_line for one in choices)
    if key not in _lists:
        found = _create(repo, config_name, choices, **how)
        if how["skip_missing"]:  # others want to hear of options that are missing, which this passes over
            return replace(found, config_overrides=given.config_overrides)
        _lists[key] = found
    return replace(_lists[key], config_overrides=given.config_overrides)


def _composed(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
    if any(one.config_path == RESOLVED for one in defaults) or not _is_ours(repo):
        return _compose(loader, defaults, repo)
    key = tuple(map(astuple, defaults))
    if key not in _trees:
        _trees[key] = pickle.dumps(_compose(loader, defaults, repo))
    return pickle.loads(_trees[key])  # sooner than a deep copy


def _loaded(repo: ConfigRepository, config_path: str) -> Any:
    if config_path.removesuffix(".yaml") == RESOLVED or not _is_ours(repo):
        return _load(repo, config_path)
    if config_path not in _files:
        _files[config_path] = pickle.dumps(_load(repo, config_path))
    return pickle.loads(_files[config_path])


def _resolved(default: InputDefault, choices: Any, text: str | None) -> str:
    return text if text is not None and "${" not in text else _resolve(default, choices(), text)


def _read(parser: OverridesParser, text: str, rule: str) -> Any:
    callables = parser.functions.functions.items()
    key = text, rule, *((name, one.__module__, one.__qualname__) for name, one in callables)
    if key not in _parsed:
        _parsed[key] = pickle.dumps(_parse(parser, text, rule))
    return pickle.loads(_parsed[key])


def _begin(config: Any, name: str, folder: Path) -> None:
    """Hydra's own record of a job, which nothing reads, is only begun: writing it takes longer than composing did."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def _is_ours(repo: Any) -> bool:
    found = {f"{source.scheme()}://{source.path}" for source in repo.get_sources()}
    return found <= SOURCES and ConfigStore.instance().repo is SCHEMAS
