"""The --help page, put together from `conf/` and the comments in `qat/config.py`."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from qat.cli import schema
from qat.cli.arguments import CONF
from qat.cli.schema import Key
from qat.config import Stage

INTRO = """\
Quantize a small chat model to lookup tables and train it to imitate the original.

  python launch.py                                   the whole job: cache, convert, distill, evaluate
  python launch.py quant=q3a4_r8 train.steps=200     other tables, a longer training
  python launch.py stage=chat checkpoint=SR-001      talk to the result of a run
  python launch.py -m train.lr=1e-4,3e-4,1e-3        a sweep, one run a value
  python launch.py +experiment=quick                 a preset: the whole job in small

Choose options of groups (quant=q2a4) and set keys (train.lr=3e-4); -m makes a,b,c a sweep.
"""

OUTRO = """\
Results: each run has a folder outputs/SR-001, SR-002, ... with result.json, metrics.jsonl, train.log,
checkpoints/best, samples.md and loss.png; a sweep's runs are outputs/sweep-001/SR-002, ...
outputs/RUNS.md is the run log, stage=report adds report.html; sweep.resume=outputs/sweep-001 finishes a sweep.
To repeat one: python launch.py --config-path outputs/SR-001 --config-name config_resolved

Flags: -m sweep | --cfg job --resolve show the composed configuration | --info | --hydra-help | --version
"""


def page() -> str:
    """The whole page."""
    groups, keys = "Groups (* is the default)", "Keys, with defaults where no option sets them"
    return "\n".join([INTRO, "Stages", *_stages(), "", groups, *_groups(), "", keys, *_keys(), "", OUTRO])


def describe(option: Path) -> str:
    """The comment that an option's file opens with."""
    lines = option.read_text(encoding="utf-8").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def _stages() -> Iterator[str]:
    for stage in Stage:
        yield f"  stage={stage.name:<12} {stage.value}"


def _groups() -> Iterator[str]:
    chosen = _defaults()
    for group in (*schema.groups(), *schema.EXTRAS):
        about = f"presets, as in +{group}=<name>" if group in schema.EXTRAS else schema.keys()[group].comment
        yield f"\n  {group}: {about}"
        for option in sorted((CONF / group).glob("*.yaml")):
            mark = "*" if chosen.get(group) == option.stem else " "
            yield f"   {mark} {option.stem:<16} {describe(option)}"


def _keys() -> Iterator[str]:
    for key in schema.keys().values():
        # What an option decides by being chosen, a backend or its name, nobody sets by hand.
        decided = key.default == MISSING and key.type is not int
        if not key.is_section and not decided:
            yield f"  {_set(key):<38} {key.comment}".rstrip()


def _set(key: Key) -> str:
    if isinstance(key.default, Enum):
        return f"{key.name}={key.default.name}"
    if key.default == MISSING:
        return f"{key.name}=<{key.type.__name__}>"
    return f"{key.name}={'null' if key.default is None else key.default}"


def _defaults() -> dict[str, str]:
    listed = OmegaConf.load(CONF / "config.yaml").defaults
    return {name: option for entry in listed if not isinstance(entry, str) for name, option in entry.items()}
