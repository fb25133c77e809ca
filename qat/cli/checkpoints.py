"""`checkpoint=<path>` and `checkpoint=SR-007` as the option `local` and its path; `qat.names` knows what they mean."""

import os

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from qat.cli.arguments import quote


def rewrite(overrides: list[str], options: list[str]) -> list[str]:
    """Replaces every `checkpoint=<value>` with a value that is not an option of the group.

    Args:
        overrides: the command line.
        options: of the group.
    """
    written: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        named = key in ("checkpoint", "+checkpoint") and equals
        written += _rewrite(value, options) or [override] if named else [override]
    return written


def _rewrite(value: str, options: list[str]) -> list[str]:
    """The overrides that `checkpoint=<value>` stands for; none when it already is one Hydra reads."""
    words = _values(value)
    if all(word in options for word in words):
        return []
    return ["checkpoint=local", f"checkpoint.path={','.join(map(quote, words))}"]


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
