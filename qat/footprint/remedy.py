"""What makes a run fit: cheaper settings, tried in the order of what they cost."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qat.config import Config, ExportType, LossKind
from qat.errors import ConfigError
from qat.export.exporter import exporter
from qat.footprint.phases import phases
from qat.footprint.places import places
from qat.footprint.shapes import Jobs, Shapes
from qat.machine import Machine

Change = Callable[[Config], None]
INSTANCE = "instance."  # beginning of keys that change no result
PART = re.compile(r"^data\.parts\[\d+\]\.")  # of which nothing can be typed but what the mixture says for all
# Numbers that decide how much there is of something, from what a student notices least
NUMBERS = (
    *("evaluate.answers", "evaluate.answer_tokens", "chat.max_tokens", "convert.calibration_tokens"),
    *("data.documents", "data.answers", "data.answer_tokens", "cache.top_k", "cache.length", "train.batch_size"),
    *("quant.mlp.rank", "quant.attn.rank", "quant.embed.rank", "quant.head.rank", "mode.rank"),
)


def remedy(
    config: Config, shapes: Shapes, jobs: Jobs, machine: Machine, phase: str | None, least: bool = False
) -> list[str]:
    """The cheapest keys with which a phase (None: every one) fits, as typed; none where all together do not help.

    Changes are tried in the order of what they cost: time alone, then precision of the conversion, then of the student,
    then less of whatever has a number and a part in the phase.
    """
    cheaper = _cheaper(config, shapes, jobs, machine, phase)
    return [said for said, _ in _found(cheaper, config, shapes, jobs, machine, phase, least)]


def adjusted(config: Config, shapes: Shapes, jobs: Jobs, machine: Machine) -> tuple[Config, Machine, list[str]]:
    """A run with the cheapest of the keys that change no result turned so that its phases fit, and those keys.

    A phase turns none that fits without, or not even with all of them.
    """
    turned: dict[str, str] = {}
    for phase in dict.fromkeys(name for name, _ in phases(config, shapes, jobs(config), machine)):
        if _fits(config, shapes, jobs, machine, phase, False):
            continue
        free = [one for one in _cheaper(config, shapes, jobs, machine, phase) if one[0].startswith(INSTANCE)]
        found = _found(iter(free), config, shapes, jobs, machine, phase, False)
        config, machine = _changed(config, machine, [change for _, change in found])
        turned |= {said.partition("=")[0]: said for said, _ in found}
    return config, machine, list(turned.values())


def _found(
    changes: Iterator[tuple[str, Change]],
    config: Config,
    shapes: Shapes,
    jobs: Jobs,
    machine: Machine,
    phase: str | None,
    least: bool,
) -> list[tuple[str, Change]]:
    def fits(taken: list[tuple[str, Change]]) -> bool:
        changed, on = _changed(config, machine, [change for _, change in taken])
        return _fits(changed, shapes, jobs, on, phase, least)

    taken: list[tuple[str, Change]] = []
    for one in changes:
        taken.append(one)
        if fits(taken):
            break
    else:
        return []
    for one in list(taken):  # what came before and is not needed
        rest = [other for other in taken if other is not one]
        if fits(rest):
            taken = rest
    return taken


def _fits(config: Config, shapes: Shapes, jobs: Jobs, machine: Machine, phase: str | None, least: bool) -> bool:
    try:
        made = list(phases(config, shapes, jobs(config), machine))
    except ConfigError:  # nothing would be left to quantize
        return False
    held = [place for name, parts in made if phase in (None, name) for place in places(parts, machine)]
    return all(place.fits(least) for place in held)


def _changed(config: Config, machine: Machine, changes: list[Change]) -> tuple[Config, Machine]:
    changed = copy.deepcopy(config)
    for change in changes:
        change(changed)
    same = changed.instance.micro_batch == config.instance.micro_batch
    rows = machine.micro_batch if same else changed.instance.micro_batch
    again = True if changed.instance.checkpointing == "true" else machine.checkpointing
    host = machine.host_moments or changed.instance.moments == "host"
    return changed, replace(machine, micro_batch=rows, checkpointing=again, host_moments=host)


def _cheaper(
    config: Config, shapes: Shapes, jobs: Jobs, machine: Machine, phase: str | None
) -> Iterator[tuple[str, Change]]:
    """Changes that take less memory, as typed, from the cheapest on."""

    def setting(key: str, value: Any) -> Change:
        *path, leaf = key.split(".")

        def change(changed: Any) -> None:
            for part in path:
                changed = getattr(changed, part)
            setattr(changed, leaf, value)

        return change

    rows = config.instance.micro_batch
    while rows > 1:
        rows //= 2
        yield f"instance.micro_batch={rows}", setting("instance.micro_batch", rows)
    if config.instance.checkpointing != "true":
        yield "instance.checkpointing=true", setting("instance.checkpointing", "true")
    if config.instance.moments != "host" and config.train.learn.latent > 0 and machine.device.type == "cuda":
        yield "instance.moments=host", setting("instance.moments", "host")
    if config.export.dtype is ExportType.fp32 and ExportType.bf16 in exporter(config.export.format).types:
        yield "export.dtype=bf16", setting("export.dtype", ExportType.bf16)
    if config.convert.gradients:
        yield "convert.gradients=false", setting("convert.gradients", False)
    if config.convert.passes > 1:
        yield "convert.passes=1", setting("convert.passes", 1)
    if config.loss.kind.needs_teacher:
        yield "loss=bucket_kl", setting("loss.kind", LossKind.bucket_kl)
    if config.train.learn.latent > 0:
        yield "train.learn.latent=0", setting("train.learn.latent", 0.0)
    for role in ("embed", "head"):
        if getattr(config.quant, role) is not None:
            yield f"quant.{role}=null", setting(f"quant.{role}", None)
    if config.mode.mlp and config.mode.attn:
        yield "mode.attn=false" if config.mode.rank else "mode=mlp", setting("mode.attn", False)
    made = phases(config, shapes, jobs(config), machine)
    named = [part.key for name, parts in made if phase in (None, name) for part in parts]
    keys = {PART.sub("data.", key) for key in named}
    for key in [key for key in NUMBERS if key in keys]:
        for value in _halves(config, key):
            yield f"{key}={value}", setting(key, value)


def _halves(config: Any, key: str) -> Iterator[int]:
    """Half of a number, half of that, and so on."""
    value = config
    for name in key.split("."):
        value = getattr(value, name, None)
    while value and value > 3:
        value //= 2
        yield value
