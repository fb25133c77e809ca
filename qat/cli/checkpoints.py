"""`checkpoint=SR-007` and `cache=<path>` as the option `local` and its path; `qat.names` knows what they mean."""

import os
from collections.abc import Callable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from qat import names
from qat.cli.arguments import quote


def rewrite(overrides: list[str], options: Callable[[str], list[str]]) -> list[str]:
    """Replaces every `checkpoint=<value>` and `cache=<value>` with a value that is not an option of the group.

    Args:
        overrides: the command line.
        options: the options of a group.
    """
    written: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        group = key.lstrip("+")
        named = group in ("checkpoint", "cache") and equals
        written += _rewrite(group, value, options(group)) or [override] if named else [override]
    return written


def _rewrite(group: str, value: str, options: list[str]) -> list[str]:
    """The overrides that `<group>=<value>` stands for; none when it already is one Hydra reads.

    Whatever else `cache` is given is a mistyped option: a cache has no names besides its own.
    """
    words = _values(value)
    if all(word in options for word in words) or (group == "cache" and not all(map(_is_cache, words))):
        return []
    return [f"{group}=local", f"{group}.path={','.join(map(quote, words))}"]


def _is_cache(word: str) -> bool:
    return os.path.exists(os.path.expanduser(word)) or names.registered(word, "cache") is not None


def _values(text: str) -> list[str]:
    """The single values of an override's text, which need not be one that Hydra's grammar takes."""
    if not text:
        return []
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        override = OverridesParser.create().parse_override(f"checkpoint={text}")
    except HydraException:  # `a=b` or `a (1)`: no value in Hydra's grammar, an ordinary file name
        return [text]
    if override.is_choice_sweep() and override.value_type is not None:
        return _listed(override)
    parsed = override.value()
    if parsed is None or isinstance(parsed, list | dict) or override.is_sweep_override():
        return []
    return [parsed if isinstance(parsed, str) else text]


def _listed(override: Override) -> list[str]:
    sweep = override.value()
    elements = getattr(sweep, "list", [])  # a glob sweep ranges over options and has no list
    return [one.text if isinstance(one, QuotedString) else str(one) for one in elements]
