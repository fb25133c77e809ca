"""Finds overrides with unknown keys or options before Hydra composes."""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice, product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from qat.cli import schema, sections, words
from qat.cli.arguments import quote
from qat.cli.compose import ANEW, MISTAKES, Composer, mapping
from qat.config import Stage
from qat.errors import ConfigError
from qat.options import files
from qat.suggest import did_you_mean, hint, named, nearest

QUOTED_KEY = re.compile(r"""[{,]\s*(['"])[^'"]*\1\s*:""")
LAYERS = "{*.down_proj: {bits: 4, rank: 8}}"  # an example
MAX_JOBS = 256  # allowed jobs in a sweep: each is composed and checked before the first starts


def read(overrides: list[str], composer: Composer, multirun: bool) -> list[Override]:
    """The overrides, parsed, each with an existing key and existing options.

    `+` and `++` are taken as written in haste: `+train.lr=1` is `train.lr=1`. The groups without a
    default, and every group of a recorded run, get the `+` that Hydra wants there.

    Raises:
        ConfigError: the first override that cannot be meant.
    """
    chosen = composer.chosen()
    if any(text.lstrip("+").partition("=")[0] in schema.nested() for text in overrides):
        extras = tuple(f"{group}=" for group in schema.presets())
        presets = [f"+{text.lstrip('+')}" for text in overrides if text.lstrip("+").startswith(extras)]
        chosen |= composer.chosen(presets)
    parsed = [_parse(text, composer, multirun) for typed in overrides for text in _for_hydra(typed, chosen)]
    for override in parsed:
        _check(override, composer, multirun)
    return parsed


def jobs(parsed: list[Override]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep, in the order of Hydra's basic sweeper.

    Raises:
        ConfigError: too many jobs, or a range that cannot be listed.
    """
    choices = {override.get_key_element(): _texts(override) for override in parsed}
    count = 1
    for texts in choices.values():
        count *= len(texts)
    if count > MAX_JOBS:
        raise ConfigError(f"this sweep has more than {MAX_JOBS} jobs: split it")
    for job in product(*choices.values()):
        yield [words.quoted(f"{key}={text}", swept=True) for key, text in zip(choices, job, strict=True)]


def _for_hydra(text: str, chosen: set[str]) -> list[str]:
    key, equals, value = text.partition("=")
    bare, known = key.lstrip("+"), schema.keys()
    if bare in schema.presets():
        return [f"+{bare}{equals}{value}"]
    if bare in schema.groups() and bare not in chosen:  # the recorded values are removed first
        return [f"{ANEW}{bare}={bare}", f"+{bare}{equals}{value}"]
    if bare in schema.nested() and value != "null" and not value.startswith("{"):
        place = f"{schema.nested()[bare]}@{bare}"
        return [f"{place}{equals}{value}" if place in chosen else f"+{place}{equals}{value}"]
    if bare not in known:
        return [text]
    if known[bare].type is dict:  # its entries are new
        return [f"++{bare}{equals}{value}"]
    if value.startswith("{") and sections.whole(bare):  # braces replace the whole section, so no option is needed
        return [f"++{bare}=???", f"{bare}={value}"]
    return [f"{bare}{equals}{value}"]


def _parse(text: str, composer: Composer, multirun: bool) -> Override:
    key, equals, value = text.partition("=")
    bare = key.lstrip("+~")
    if key.startswith("~"):
        raise ConfigError(f"{text} would delete what every run needs: set it instead, {bare}=<value>")
    if not bare.startswith(("hydra.", "hydra/")):
        _check_key(bare) if equals else _check_word(bare)
    parser = OverridesParser(words.functions(), composer.loader)
    try:
        override = parser.parse_override(text)
    except MISTAKES as error:
        if not _takes_text(bare) or (multirun and "," in value):
            raise ConfigError(f"cannot read {bare}={value}: {_how_to_write(bare, value)}") from error
        override = parser.parse_override(f"{key}={quote(value)}")
    override.config_loader = composer.loader
    return override


def _how_to_write(name: str, value: str) -> str:
    """What to do with a value that Hydra's grammar does not take, which has no quotes around the keys of braces."""
    if QUOTED_KEY.search(value):
        return f"names before a colon stand without quotes, as in \"{name}={LAYERS}\""
    return f"quote a value with special characters, as in \"{name}='a, b'\""


def _takes_text(name: str) -> bool:
    """True for a key whose value needs none of Hydra's grammar: `model.path=~/my-model` is a path as it stands."""
    key = schema.keys().get(name)
    return key is not None and key.type in (str, Any)


def _check_word(word: str) -> None:
    """Refuses a word without `=`; the error names the setting that it may stand for."""
    stage, keys = named(word, {stage.name: stage.value for stage in Stage}), schema.keys()
    if word in keys and not stage:
        raise ConfigError(f"{word} has no value: write {word}=<value>")
    meant = f"stage={stage}" if stage else _choice(word)
    raise ConfigError(f"{word} is no setting{hint(meant)}; settings are written key=value")


def _choice(word: str) -> str | None:
    """The nearest option with its group, or `--help`."""
    groups = (*schema.groups(), *schema.presets())
    choices = {option.stem: f"{group}={option.stem}" for group in groups for option in files(group)}
    choices["help"] = "--help"
    found = nearest(word, choices)
    return choices[found] if found else None


def _check_key(key: str) -> None:
    known = [*schema.keys(), *schema.presets()]
    places = [f"schema@{group}" for group in schema.groups()]
    places += [f"{group}@{name}" for name, group in schema.nested().items()]
    if owner := mapping(key):
        raise ConfigError(f"{key}: names of {owner} stand in braces, as in \"{owner}={LAYERS}\"")
    if key not in places and key not in known:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, known)}")


def _check(override: Override, composer: Composer, multirun: bool) -> None:
    if override.is_sweep_override() and not multirun:
        raise ConfigError(f"{override.input_line} lists several values: add -m to sweep over them, or quote it as one")
    if override.key_or_group in (*schema.groups(), *schema.presets()):
        for option in _texts(override):
            _check_option(override.package or override.key_or_group, option, composer.options(override.key_or_group))


def _check_option(place: str, option: str, options: list[str]) -> None:
    option = option.strip("'\"")
    if option not in options and not (option == "null" and place in schema.nested()):
        choices = f"{place} is one of {', '.join(options)}"
        if place in ("model", "teacher") and os.path.isdir(os.path.expanduser(option)):
            choices = f"for the folder of that name write {place}=local {place}.path={option}; {choices}"
        raise ConfigError(f"{place}={option}: no such option{did_you_mean(option, options)}; {choices}")


def _texts(override: Override) -> list[str]:
    """The values an override ranges over, as text; a plain one ranges over itself."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    try:
        texts: Iterable[str] = override.sweep_string_iterator()
        return list(islice(texts, MAX_JOBS + 1))
    except MISTAKES as error:
        raise ConfigError(f"{override.input_line} cannot be listed: {str(error).splitlines()[0]}") from error
