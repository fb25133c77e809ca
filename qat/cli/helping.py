"""The --help pages, put together from `conf/` and what keys say in `qat/config/`, no wider than the terminal."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import get_args

from omegaconf import MISSING

from qat.cli import schema
from qat.cli.schema import Key
from qat.config import CONF, Stage
from qat.errors import ConfigError
from qat.installation import command
from qat.options import defaults, files
from qat.shown import wrapped
from qat.suggest import did_you_mean

TITLE = "Quantize a small chat model to a few bits and train it to imitate the original."

EXAMPLES = {
    "": "the whole job",
    "quant=q3a4_r8 train.steps=200": "3 bits at rank 8, more steps",
    "stage=chat checkpoint=SR-001": "talk to the result of a run",
    "-m train.lr=1e-4,3e-4,1e-3": "a sweep, one run a value",
    "+experiment=quick": "a preset, the job in small",
    "stage=doctor": "this machine, what is amiss",
    "--help quant train.lr": "more on a group or a key",
    "--help stage=export": "more on a stage",
}

TYPED = (
    "Choose options of groups (quant=q2a4) and set keys (train.lr=3e-4); -m makes a,b,c a sweep.",
    "Options of your own are files conf/<group>/<name>.yaml where you are, or below --config-dir or the folder in"
    " QAT_CONF.",
)

RESULTS = (
    "Each run has a folder outputs/SR-001, SR-002, ... with result.json, metrics.jsonl, train.log, checkpoints/best,"
    " samples.md and loss.png; a sweep's runs are outputs/sweep-001/SR-002, ...",
    "outputs/RUNS.md is the run log, stage=report adds report.html; sweep.resume=outputs/sweep-001 finishes a sweep.",
)

FLAGS = {
    "-m": "a sweep",
    "--cfg job --resolve": "show the composed configuration",
    "--config-path SR-001": "repeat a run by its record",
    "--config-dir <folder>": "options of your own",
    "--version": "of this program",
    "--info, --hydra-help": "what Hydra says of itself",
}

# Columns at which meanings begin, beside what they are the meanings of.
OPTION = 24
KEY = 31


def page(topics: list[str]) -> str:
    """The whole page, or what is known of each topic: a group, a section, a key or a stage.

    Raises:
        ConfigError: there is no such topic.
    """
    if topics:
        return "\n\n".join("\n".join(_about(topic)) for topic in topics)
    groups, keys = "Groups (* is the default)", "Keys, with defaults where no option sets them"
    top = [_text(TITLE), "", "Usage", *_examples(), *_indented(TYPED)]
    end = ["Results", *_indented(RESULTS), "", "Flags", *_flags()]
    return "\n".join([*top, "", "Stages", *_stages(), "", groups, *_groups(), "", keys, *_keys(), "", *end])


def describe(option: Path) -> str:
    """The comment that an option's file opens with."""
    lines = option.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def summary(group: str) -> str:
    """A line on what a group is for."""
    return f"presets, as in +{group}=<name>" if group in schema.presets() else schema.keys()[group].comment


def below(section: str) -> list[Key]:
    """The keys of a section that hold a value, but for names of options."""
    found = [key for key in schema.keys().values() if key.name.startswith(f"{section}.") and not key.is_section]
    return [key for key in found if not key.name.endswith(".name")]


def _examples() -> Iterator[str]:
    typed = {f"  {command()} {words}".rstrip(): meaning for words, meaning in EXAMPLES.items()}
    yield from (_row(words, meaning, max(map(len, typed)) + 2) for words, meaning in typed.items())


def _indented(texts: tuple[str, ...]) -> Iterator[str]:
    yield from (_row("", text, 2) for text in texts)


def _flags() -> Iterator[str]:
    yield from (_row(f"  {flags}", meaning, KEY) for flags, meaning in FLAGS.items())


def _stages() -> Iterator[str]:
    yield from (_row(f"  stage={stage.name}", stage.value, OPTION) for stage in Stage)


def _groups() -> Iterator[str]:
    for group in (*schema.groups(), *schema.presets()):
        yield "\n" + _row("", f"{group}: {summary(group)}", 2)
        yield from _options(group)


def _options(group: str, section: str | None = None) -> Iterator[str]:
    """A group's options, or what they are to another section that takes them and has no default."""
    for option in files(group):
        mark = "*" if not section and defaults().get(group) == option.stem else " "
        own = "" if option.is_relative_to(CONF) else f"[{option}]"
        meaning = describe(option).replace(f"{group}.", f"{section or group}.")
        yield _row(f"   {mark} {option.stem}", meaning, OPTION, own)


def _names(group: str) -> list[str]:
    return [option.stem for option in files(group)]


def _keys() -> Iterator[str]:
    for key in schema.keys().values():
        top = key.name.partition(".")[0]
        if key.name == top and _may_be_null(top):
            yield _row(f"  {top}=null", f"{key.comment} (its keys: --help {top})", KEY)
        # Keys that choosing an option sets, such as its backend or name, are not set by hand.
        decided = key.default == MISSING and key.type is not int
        if not (key.is_section or decided or _may_be_null(top) or key.type is Stage):
            yield _row(f"  {_set(key)}", key.comment, KEY)


def _may_be_null(name: str) -> bool:
    """Whether a key is a section that a run need not have."""
    return schema.keys()[name].is_section and NoneType in get_args(schema.hint(name))


def _set(key: Key) -> str:
    if key.default == MISSING:
        return f"{key.name}=<{key.type.__name__}>"
    return f"{key.name}={schema.written(key.default)}"


def _about(topic: str) -> Iterator[str]:
    """The lines on one topic; a value typed after it is passed over, but for a stage."""
    name, _, value = topic.partition("=")
    name = name.lstrip("+")
    known = [*schema.keys(), *schema.presets()]
    if name not in known:
        groups = [group for group in (*schema.groups(), *schema.presets()) if name in _names(group)]
        meant = f" (it is an option of {groups[0]}: see --help {groups[0]})" if groups else did_you_mean(name, known)
        raise ConfigError(f"--help {topic}: no such group or key{meant}")
    key = schema.keys().get(name)
    if name == "stage" and value:
        if value not in Stage.__members__:
            raise ConfigError(f"--help {topic}: no such stage{did_you_mean(value, Stage.__members__)}")
        yield from _stage(Stage[value])
        return
    if key is not None and not key.is_section:
        yield from _value(key)
        return
    yield _text(f"{name}: {summary(name)}")
    if name in schema.presets():
        yield from _options(name)
    elif name in schema.groups():
        yield from (f"\nOptions, as in {name}=<option> (* is the default)", *_options(name))
    elif name in schema.nested():
        yield from (f"\nOptions, as in {name}=<option>", *_options(schema.nested()[name], name))
    if key is not None:
        yield "\nKeys, with defaults where no option sets them"
        for one in below(name):
            yield from _value(one)


def _stage(stage: Stage) -> Iterator[str]:
    """What a stage does, and the group or the section that has its name."""
    yield _text(f"stage={stage.name}: {stage.value}")
    known = schema.keys()
    if stage.name in known:
        yield ""
        yield from _about(stage.name)


def _value(key: Key) -> Iterator[str]:
    """A key with what it takes: in brackets after its comment, or one line for each of its words."""
    words = key.words()
    if any(words.values()):
        yield _row("", f"{key.name}: {key.comment}", 2)
        for word, meaning in words.items():
            mark = "*" if schema.written(key.default) == word else " "
            yield _row(f"   {mark} {word}", meaning, OPTION)
    else:
        yield _row(f"  {_set(key)}", f"{key.comment} ({key.takes()})", KEY)


def _row(label: str, text: str, column: int, path: str = "") -> str:
    """A label and its meaning, which begins at a column: beside the label, or below it where that is too long."""
    if len(label) < column:
        return wrapped(text, _width(), label.ljust(column), path)
    return f"{label}\n{wrapped(text, _width(), ' ' * column, path)}"


def _text(text: str) -> str:
    return wrapped(text, _width())


def _width() -> int:
    """Columns of the terminal; 80 where there is none, so that a page fits `less` too."""
    return shutil.get_terminal_size().columns
