"""The words typed, as flags and overrides that Hydra reads the way the user meant them."""

import os
import re
from argparse import ArgumentParser
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser

from qat import names, options, references
from qat.cli import recorded, schema, trusted, words
from qat.config import CONF, Config
from qat.errors import ConfigError
from qat.identities import RESOLVED
from qat.installation import NAME
from qat.suggest import hint, nearest

# At most two digits of exponent: nobody means more, and 1e999999999 would fill the memory.
_EXPONENT = re.compile(r"(?<![\w.])\d+(?:\.\d*)?[eE]\+?\d{1,2}(?![\w.])")
_MODES = ("run", "multirun", "cfg", "info", "shell_completion")


@dataclass
class CommandLine:
    """Flags (`--multirun`) and overrides (`train.lr=1e-3`), each override still as text."""

    flags: dict[str, Any]
    overrides: list[str]

    @property
    def multirun(self) -> bool:
        """True for a sweep."""
        return self.flags["multirun"] or "hydra.mode=MULTIRUN" in self.overrides

    @property
    def starts_jobs(self) -> bool:
        """False for the flags that only print something."""
        printing = ("help", "hydra_help", "cfg", "info", "shell_completion")
        return not any(self.flags[name] for name in printing)

    @property
    def outputs(self) -> Path:
        """The outputs folder as it is typed, for what is named before anything is composed."""
        return Path(os.path.expanduser([Config.outputs, *self.values("outputs")][-1]))

    def values(self, key: str) -> list[str]:
        """What the overrides give to a key, as text."""
        typed = (text.lstrip("+").partition("=") for text in self.overrides)
        return [value.strip("'\"") for name, _, value in typed if name == key]

    def argv(self) -> list[str]:
        """The same command line for Hydra, flags first: it rejects `a=1 -m b=2`."""
        own = None if recorded.is_meant(self.flags) else self.flags["config_path"]
        given = {name.replace("_", "-"): value for name, value in (self.flags | {"config_path": own}).items() if value}
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        # A user's own configuration also needs our logging, and may use options of our groups.
        searchpath = [f"hydra.searchpath=[{quote(f'file://{CONF}')}]"] if own else []
        return flags + searchpath + self.overrides


def parse(argv: list[str]) -> CommandLine:
    """Splits the words typed into flags and overrides.

    Raises:
        ConfigError: an unknown flag, a flag's wrong value, flags that exclude each other, or bytes that are no text.
    """
    for word in argv:
        _check_word(word)
    parser = get_args_parser()
    parser.allow_abbrev = False
    # argparse would print its usage on two lines more and exit.
    parser.error = _refuse  # type: ignore[method-assign]
    _name_version(parser)
    flags = vars(parser.parse_intermixed_args(argv))
    overrides = flags.pop("overrides")
    _check_flags(flags)
    _check_completion(flags, overrides)
    options.name(flags["config_dir"])
    command = CommandLine(flags, overrides)
    command.overrides = [words.quoted(_whole_numbers(text), command.multirun) for text in overrides]
    _find_config(command)
    return command


def _name_version(parser: ArgumentParser) -> None:
    """Has `--version` say this program's before Hydra's own."""
    with suppress(PackageNotFoundError):  # a clone that nobody installed has none
        for action in parser._actions:
            if "--version" in action.option_strings:
                action.version = f"{NAME} {version(NAME)}, {action.version}"  # type: ignore[attr-defined]


def quote(text: str) -> str:
    """`text` as a quoted value of Hydra's override grammar, with nothing in it special."""
    text = references.escaped(text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    tail = re.search(r"\\*$", text)
    return f"'{text}{tail[0] if tail else ''}'"


def flag_names() -> list[str]:
    """Every flag by its long name."""
    actions = get_args_parser()._actions
    return [name for action in actions for name in action.option_strings if name.startswith("--")]


def _check_word(word: str) -> None:
    """A word of bytes that are text, as the record of a run must hold it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{ascii(word)[1:-1]} is not UTF-8: type it in UTF-8, or rename the file that it is the name of"
        ) from None


def _refuse(message: str) -> NoReturn:
    unknown = re.search(r"unrecognized arguments: (-\S+)", message)
    if unknown is None:
        raise ConfigError(message)
    known = {name[2:]: name for name in flag_names()} | {
        key: f"{key}=<value>" for key in (*schema.keys(), *schema.presets())
    }
    flag = unknown[1].split("=")[0]
    found = nearest(flag.lstrip("-").replace("-", "_"), known)
    raise ConfigError(f"unknown flag {flag}{hint(found and known[found])}; settings are written key=value")


def _check_flags(flags: dict[str, Any]) -> None:
    if flags["experimental_rerun"]:
        raise ConfigError("--experimental-rerun is not supported: use --config-path <run folder>")
    modes = [f"--{name.replace('_', '-')}" for name in _MODES if flags[name]]
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(modes)} exclude each other: give one of them")
    if flags["resolve"] and not (flags["cfg"] or flags["help"]):
        raise ConfigError("--resolve only goes with --cfg")


def _check_completion(flags: dict[str, Any], words: list[str]) -> None:
    wanted = re.compile(r"(install|uninstall|query)=(bash|fish|zsh)")
    if flags["shell_completion"] and not (len(words) == 1 and wanted.fullmatch(words[0])):
        raise ConfigError("--shell-completion takes install=, uninstall= or query= and a shell")


def _find_config(command: CommandLine) -> None:
    """Makes `--config-path <run>` enough to repeat a run."""
    flags, folder = command.flags, command.flags["config_path"]
    if not folder or "://" in folder:
        return
    if not os.path.isdir(folder):
        with suppress(ConfigError):  # no run has this name either: reported later, where the folder is needed
            folder = str(names.run(folder, command.outputs))
    # Hydra would take a relative folder as relative to launch.py.
    flags["config_path"] = os.path.abspath(folder)
    named = (flags["config_name"] or "").removesuffix(".yaml")
    is_own = os.path.exists(os.path.join(folder, "config.yaml")) and not trusted.holder(Path(folder))
    if named == RESOLVED or not (named or is_own):
        flags["config_name"] = RESOLVED


def _whole_numbers(override: str) -> str:
    """`train.steps=1e3` as `train.steps=1000`: Hydra reads 1e3 as a float, which no integer key takes."""
    name, equals, value = override.partition("=")
    key = schema.keys().get(name.lstrip("+"))
    if key is None or key.type is not int:
        return override
    return name + equals + _EXPONENT.sub(_as_integer, value)


def _as_integer(match: re.Match[str]) -> str:
    number = Decimal(match[0])
    return str(int(number)) if number == int(number) else match[0]
