"""The --help pages, put together from `conf/` and what keys say in `qat/config/`."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import MISSING

from qat.cli import schema
from qat.cli.schema import Key
from qat.config import CONF, Stage
from qat.errors import ConfigError
from qat.installation import command
from qat.options import defaults, files
from qat.suggest import did_you_mean

INTRO = """\
Quantize a small chat model to a few bits a weight and train it to imitate the original.

{examples}

Choose options of groups (quant=q2a4) and set keys (train.lr=3e-4); -m makes a,b,c a sweep.
Options of your own are files conf/<group>/<name>.yaml where you are, or below --config-dir or the folder in QAT_CONF.
"""

EXAMPLES = {
    "": "the whole job: cache, convert, distill, evaluate",
    "quant=q3a4_r8 train.steps=200": "3 bits at rank 8, a longer training",
    "stage=chat checkpoint=SR-001": "talk to the result of a run",
    "-m train.lr=1e-4,3e-4,1e-3": "a sweep, one run a value",
    "+experiment=quick": "a preset: the whole job in small",
    "stage=doctor": "what this machine has, and what is amiss",
    "--help quant train.lr": "more on a group, a section or a key",
}

OUTRO = """\
Results: each run has a folder outputs/SR-001, SR-002, ... with result.json, metrics.jsonl, train.log,
checkpoints/best, samples.md and loss.png; a sweep's runs are outputs/sweep-001/SR-002, ...
outputs/RUNS.md is the run log, stage=report adds report.html; sweep.resume=outputs/sweep-001 finishes a sweep.
To repeat one: {command} --config-path outputs/SR-001 --config-name config_resolved

Flags: -m sweep | --cfg job --resolve show the composed configuration | --info | --hydra-help | --version
"""


def page(topics: list[str]) -> str:
    """The whole page, or what is known of each topic: a group, a section or a key.

    Raises:
        ConfigError: there is no such topic.
    """
    if topics:
        return "\n\n".join("\n".join(_about(topic)) for topic in topics)
    groups, keys = "Groups (* is the default)", "Keys, with defaults where no option sets them"
    examples = "\n".join(f"  {f'{command()} {words}':<48} {meaning}" for words, meaning in EXAMPLES.items())
    intro, outro = INTRO.format(examples=examples), OUTRO.format(command=command())
    return "\n".join([intro, "Stages", *_stages(), "", groups, *_groups(), "", keys, *_keys(), "", outro])


def describe(option: Path) -> str:
    """The comment that an option's file opens with."""
    lines = option.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def summary(group: str) -> str:
    """A line on what a group is for."""
    return f"presets, as in +{group}=<name>" if group in schema.presets() else schema.keys()[group].comment


def below(section: str) -> list[Key]:
    """The keys of a section that hold a value, but for the name of its option."""
    found = [key for key in schema.keys().values() if key.name.startswith(f"{section}.") and not key.is_section]
    return [key for key in found if key.name != f"{section}.name"]


def _stages() -> Iterator[str]:
    for stage in Stage:
        yield f"  stage={stage.name:<12} {stage.value}"


def _groups() -> Iterator[str]:
    for group in (*schema.groups(), *schema.presets()):
        yield f"\n  {group}: {summary(group)}"
        yield from _options(group, defaults().get(group))


def _options(group: str, chosen: str | None) -> Iterator[str]:
    width = max([16, *map(len, _names(group))])
    for option in files(group):
        mark = "*" if chosen == option.stem else " "
        own = "" if option.is_relative_to(CONF) else f"[{option}]"
        yield f"   {mark} {option.stem:<{width}} {describe(option)} {own}".rstrip()


def _names(group: str) -> list[str]:
    return [option.stem for option in files(group)]


def _keys() -> Iterator[str]:
    for key in schema.keys().values():
        # Keys that choosing an option sets, such as its backend or name, are not set by hand.
        decided = key.default == MISSING and key.type is not int
        if not key.is_section and not decided:
            yield _line(key)


def _line(key: Key) -> str:
    return f"  {_set(key):<38} {key.comment}".rstrip()


def _set(key: Key) -> str:
    if key.default == MISSING:
        return f"{key.name}=<{key.type.__name__}>"
    return f"{key.name}={schema.written(key.default)}"


def _about(topic: str) -> Iterator[str]:
    """The lines on one topic; a value typed after it is passed over."""
    name = topic.partition("=")[0].lstrip("+")
    known = [*schema.keys(), *schema.presets()]
    if name not in known:
        groups = [group for group in (*schema.groups(), *schema.presets()) if name in _names(group)]
        meant = f" (it is an option of {groups[0]}: see --help {groups[0]})" if groups else did_you_mean(name, known)
        raise ConfigError(f"--help {topic}: no such group or key{meant}")
    key = schema.keys().get(name)
    if key is not None and not key.is_section:
        yield from _value(key)
        return
    yield f"{name}: {summary(name)}"
    if (group := schema.nested().get(name, name)) in (*schema.groups(), *schema.presets()):
        default = " (* is the default)" if group == name else ""
        yield from (f"\nOptions, as in {name}=<option>{default}", *_options(group, defaults().get(name)))
    if key is not None:
        yield "\nKeys, with defaults where no option sets them"
        for one in below(name):
            yield from _value(one)


def _value(key: Key) -> Iterator[str]:
    """A key with what it takes: in brackets after its comment, or one line for each of its words."""
    words = key.words()
    if any(words.values()):
        yield f"  {key.name}: {key.comment}"
        for word, meaning in words.items():
            mark = "*" if schema.written(key.default) == word else " "
            yield f"   {mark} {word:<16} {meaning}"
    else:
        yield f"{_line(key)} ({key.takes()})"
