"""Composes overrides to a `Config` with Hydra, and explains each of Hydra's errors in one sentence."""

import os
import re
from pathlib import Path
from typing import Any, get_args

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from qat import options
from qat.cli import recorded, schema, sections, trusted, words
from qat.config import CONF, Config, Stage
from qat.config.keys import values
from qat.errors import ConfigError
from qat.names import settled
from qat.suggest import did_you_mean, hint, named

# What Hydra and OmegaConf raise on a user's mistake. Beside their own trees that is ValueError for
# `quant=null`, AssertionError and AttributeError for a key below a section that is null, KeyError
# for an unset variable in `hydra.job.env_copy`, RecursionError for a hundred nested brackets.
MISTAKES = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    OSError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    KeyError,
    RecursionError,
)

# How an override begins by which a group that has values gets those of its schema, before an option of it.
ANEW = "+schema@"


class OwnOptions(SearchPathPlugin):
    """Has Hydra find the options of a person's own folders behind the package's; of `--config-dir` it knows."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the folders."""
        for folder in options.standing():
            search_path.append("own", f"file://{folder.absolute()}")


class Composer:
    """Composes the file that the flags name, by default `conf/config.yaml`."""

    def __init__(self, flags: dict[str, Any]) -> None:
        """Registers the schemas and finds the folders that `flags` name.

        Raises:
            ConfigError: one is not there, holds data, or is a recorded run with more than our own keys in it.
        """
        version.setbase("1.3")
        setup_globals()
        JobRuntime.instance().set("name", "launch")  # the job name that Hydra will use, after launch.py
        schema.register()
        words.register()
        Plugins.instance().register(OwnOptions)
        self.name = flags.get("config_name") or "config"
        self.is_default = self.name == "config" and not flags.get("config_path")
        self.loader = ConfigLoaderImpl(_search_path(flags))
        self.recorded: dict[str, Any] | None = None
        if recorded.is_meant(flags):
            self.recorded = recorded.offered(Path(flags["config_path"]) / recorded.FILE)

    def options(self, group: str) -> list[str]:
        """The options of a group, in order."""
        return sorted(self.loader.repository.get_group_options(group, ObjectType.CONFIG))

    def chosen(self, presets: list[str] | None = None) -> set[str]:
        """Groups that the primary config, with some presets, has an option of; a recorded run has values instead."""
        if self.is_default and not presets:
            return set(schema.groups())
        return set(self.compose(presets or []).hydra.runtime.choices)

    def compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        """The composed tree, `hydra` included.

        Raises:
            ConfigError: it cannot be composed; nothing has been created.
        """
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        if self.recorded is not None:
            recorded.offer(self.recorded, {_group(text) for text in overrides if text.startswith(ANEW)})
        try:
            return self.loader.load_configuration(self.name, overrides, mode)
        except MISTAKES as error:
            raise ConfigError(self._missing(error, overrides) or explain(error)) from error

    def _missing(self, error: BaseException, overrides: list[str]) -> str | None:
        """Which section a key needs that is null; None for any other error."""
        inside = [text for text in overrides if sections.around(text)]
        if not inside or not isinstance(error.__cause__ or error, AssertionError | AttributeError):
            return None
        rest = self.compose([text for text in overrides if text not in inside])
        return next((told for text in inside if (told := sections.lacking(text, rest))), None)


def typed(composed: DictConfig) -> Config:
    """The dataclass tree of a composed configuration, a checkpoint that is named in it with its path.

    Args:
        composed: loses Hydra's own section, as a copy of all would take longer than everything else here.

    Raises:
        ConfigError: a value of the wrong type, a missing one or an unknown key.
    """
    with read_write(composed), open_dict(composed):
        composed.pop("hydra", None)
    try:
        if OmegaConf.get_type(composed) is not Config:  # a user's own file that does not start from `schema`
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
        else:
            config = OmegaConf.to_object(composed)
    except MISTAKES as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    config.outputs = os.path.expanduser(config.outputs)
    if config.stage is not Stage.pull:  # stage=pull looks up names in the store instead
        config.checkpoint = settled(config.checkpoint, Path(config.outputs))
    for found in values(config):
        if found.said.words and found.value:  # YAML's and Hydra's false arrives as "False"
            setattr(found.owner, found.field.name, found.value.lower())
    return config


def explain(error: BaseException) -> str:
    """What a Hydra or OmegaConf error means for the user, in one sentence; a defect is raised again as it is.

    So is a signal: OmegaConf, stopped between two steps, may fail while it puts things back, and tell of that alone.
    """
    before = error
    while before.__context__ is not None:
        before = before.__context__
        if isinstance(before, KeyboardInterrupt):
            raise before
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, AssertionError | AttributeError) and not isinstance(error, OmegaConfBaseException):
        raise error
    key = getattr(error, "full_key", None) or ""
    first, *rest = str(error).split("\n")
    if isinstance(error, MissingMandatoryValue):
        group = key.removesuffix(".name")
        return f"{group} has no option: choose {group}=<option>" if group in schema.nested() else f"{key} has no value"
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and key:
        return _unknown(key)
    if isinstance(error, ValidationError):
        return _wrong_type(key, first)
    if isinstance(error, RecursionError):
        return "a value is nested too deeply to be read"
    return _in_file(first, rest) if first.endswith("raised while composing config:") else first


def _in_file(where: str, reason: list[str]) -> str:
    """A wrong field or value in a file, which Hydra tells as text alone."""
    where = re.sub(r": \w+ raised while composing config:", "", where)
    whole = re.search(r"full_key: (\S+)", "\n".join(reason))
    what = _unknown(whole[1]) if whole and re.match(r"Key '.*' not in", reason[0]) else reason[0]
    return f"{where}: {what}"


def _unknown(key: str) -> str:
    """A key that does not exist; where one like it is in its own section, that is meant."""
    section, _, last = key.rpartition(".")
    if owner := mapping(key):
        entry = schema.required(get_args(schema.hint(owner))[1])
        return f"unknown key {key}{did_you_mean(last, schema.hints(entry))}"
    beside = [name for name in [*schema.keys()] if section and name.startswith(f"{section}.")]
    return f"unknown key {key}{did_you_mean(key, beside) or did_you_mean(key, schema.keys())}"


def _wrong_type(key: str, reason: str) -> str:
    known = schema.keys().get(key)
    if known is not None and known.is_section:
        below = ", ".join(name for name in list(schema.keys()) if name.startswith(f"{key}."))
        return f"{key} is a section and takes no single value: set one of {below}"
    if known is not None and known.type is list:
        return f"{key} takes a list: write it in brackets, {key}=[one,two]"
    if known is not None and known.type is dict:
        return f"{key} takes a mapping: write it in braces, {key}={{name: value}}"
    quoted = re.search(r"[Vv]alue '(.*?)'", reason)
    if known is None and (owner := mapping(key)):
        return f"{key} takes a section in braces, as in {owner}={{{key.removeprefix(owner)[1:]}: {{…}}}}"
    if known is None or quoted is None:
        return f"{key}: {reason[:1].lower()}{reason[1:]}"
    return f"{key}={quoted[1]}: expected {known.kind()}{hint(named(quoted[1], known.words()))}"


def mapping(key: str) -> str | None:
    """The mapping of which a key is an entry, or a part of one."""
    known = schema.keys().values()
    return next((one.name for one in known if one.type is dict and key.startswith(f"{one.name}.")), None)


def _group(override: str) -> str:
    return override.removeprefix(ANEW).partition("=")[0]


def _search_path(flags: dict[str, Any]) -> ConfigSearchPath:
    main, extra = flags.get("config_path"), flags.get("config_dir")
    run = main if recorded.is_meant(flags) else None
    for flag, folder in (("--config-path", main), ("--config-dir", extra)):
        if folder and "://" not in folder and not os.path.isdir(folder):
            raise ConfigError(f"{flag} {folder}: no such folder")
        if folder and folder is not run:
            trusted.refuse_data(Path(folder.removeprefix("file://")), f"{flag} {folder}")
    own = None if run else main
    path = create_config_search_path(own or str(CONF))
    if own:
        path.prepend("conf", f"file://{CONF}", SearchPathQuery(provider="schema"))
    if extra:
        path.prepend("command-line", f"file://{os.path.abspath(extra)}", SearchPathQuery(provider="schema"))
    return path
