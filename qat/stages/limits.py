"""Finds sizes that cannot work with these models on this machine, before the run does anything."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qat import checkpoints, footprint
from qat.checkpoint_files import find
from qat.config import Config, DataSource, QuantConfig, Stage, as_plain
from qat.console import size
from qat.data import mix
from qat.distill.parameters import LATENT, NORMS
from qat.errors import ConfigError
from qat.export.exporter import exporter
from qat.footprint import Job, Place, Shapes
from qat.footprint.places import LEAD
from qat.footprint.remedy import INSTANCE
from qat.machine import Machine
from qat.models import ModelFolder
from qat.peaks import peaks
from qat.processes import place
from qat.quant import budget
from qat.quant.architectures import learns, select
from qat.quant.choice import key_of
from qat.runs import Run

log = logging.getLogger(__name__)

CONVERTS = (Stage.run, Stage.convert)
TRAINS = (Stage.run, Stage.distill)
AUTO = "auto"  # the instance that is whatever is there


def check(
    config: Config, model: ModelFolder, teacher: ModelFolder, machine: Machine
) -> tuple[Machine, dict[str, int]]:
    """Looks at shapes, lengths, counts and memory.

    Args:
        config: of the run.
        model: the one that is quantized.
        teacher: the model itself, or another one.
        machine: that it is to run on.

    Returns:
        The machine, of `instance=auto` with what of its settings makes the run fit; and bytes that each phase is
        expected to take of it.

    Raises:
        ConfigError: the first that cannot work, with its bound or what takes the memory.
    """
    jobs = check_shapes(config, model, teacher)
    shapes = shapes_of(model, teacher, machine)
    if config.instance.name == AUTO and max(config.instance.devices, place().count) == 1:
        config, machine = _adjusted(config, shapes, model, machine)
    footprint.check(config, shapes, lambda changed: list(_jobs(changed, model)), machine)
    if places := footprint.plan(config, shapes, jobs, machine):
        log.info("%s%s", LEAD, footprint.summary(places))
    return machine, footprint.expected(config, shapes, jobs, machine)


def check_shapes(config: Config, model: ModelFolder, teacher: ModelFolder) -> list[Job]:
    """Looks at shapes, lengths and counts alone, for which names and shapes of the two models are enough.

    Returns:
        The students of the run.

    Raises:
        ConfigError: the first that cannot work, with its bound.
    """
    check_lengths(config, model, teacher)
    for key, folder in (("model", model), ("teacher", teacher)):
        _check_vocabulary(config, f"{key}={folder.name}", folder.vocab_size())
    jobs = list(_jobs(config, model))
    for job, quant in zip(jobs, _quants(config), strict=False) if config.stage in CONVERTS else []:
        _check_layers(job, quant, model)
        if quant.candidates:
            budget.check(quant, job.layers, model.skeleton())
    for job in jobs if config.stage in TRAINS else []:
        _check_learning(job)
    return jobs


def _adjusted(config: Config, shapes: Shapes, model: ModelFolder, machine: Machine) -> tuple[Config, Machine]:
    """The run on `instance=auto`, which is whatever makes it fit; several processes would have to agree on it."""
    config, machine, keys = footprint.adjusted(config, shapes, lambda changed: list(_jobs(changed, model)), machine)
    if keys:
        log.info("memory is short: %s from here on, which changes no result", " ".join(keys))
    return config, machine


def record_expected(run: Run, expected: dict[str, int]) -> None:
    """Notes in the record what each phase is expected to take, and what is taken before the first one."""
    memory = run.result["memory"]
    memory["start_bytes"] = peaks.start[0]
    memory["planned_bytes"] = max(expected.values(), default=0)
    memory["phases"] = {name: {"planned_bytes": count} for name, count in expected.items()}


def record_taken(run: Run) -> None:
    """Notes what each phase took so far beyond the start, of what computes and of host memory; and the most of all."""
    memory, (device, host) = run.result["memory"], peaks.start
    phases = memory.setdefault("phases", {})
    for name, found in peaks.found.items():
        phases.setdefault(name, {}).update({"peak_bytes": found.device, "host_bytes": found.host})
        memory["peak_bytes"] = max(memory.get("peak_bytes", 0), device + found.device)
        memory["host_bytes"] = max(memory.get("host_bytes", 0), host + found.host)


def planned(config: Config, model: ModelFolder, teacher: ModelFolder, machine: Machine) -> dict[str, Place]:
    """What each phase of a run is expected to take."""
    return footprint.plan(config, shapes_of(model, teacher, machine), list(_jobs(config, model)), machine)


def advice(
    config: Config, model: ModelFolder, teacher: ModelFolder, machine: Machine, phase: str, place: Place
) -> str:
    """What makes a phase fit that is expected to take more than is free; empty where it fits."""
    if place.fits():
        return ""
    shapes = shapes_of(model, teacher, machine)
    keys = footprint.remedy(config, shapes, lambda changed: list(_jobs(changed, model)), machine, phase)
    makes = f"{' '.join(keys)} makes it fit" if keys else "no key makes it fit: choose a smaller model"
    if keys and config.instance.name == AUTO and all(key.startswith(INSTANCE) for key in keys):
        makes = f"instance={AUTO} turns {' '.join(keys)} by itself"
    return f"{size(place.room())} are free{place.where}; {makes}"


def shapes_of(model: ModelFolder, teacher: ModelFolder, machine: Machine) -> Shapes:
    """Sizes of a model and of its teacher, where that is another one."""
    return replace(_shapes(model, machine), teacher=None if teacher is model else _shapes(teacher, machine))


def _shapes(folder: ModelFolder, machine: Machine) -> Shapes:
    """Sizes of a model; as long as nobody has looked, large decoder layers are taken to be readable one at a time."""
    known = folder.found.streams.get((machine.dtype, machine.device.type), "")
    return Shapes.of(folder.skeleton(), folder.settings(), not known and not folder.small(machine.dtype))


def check_lengths(config: Config, model: ModelFolder, teacher: ModelFolder) -> None:
    """Checks that no text is longer than a model's context.

    Raises:
        ConfigError: one would be.
    """
    for folder in (model, teacher):
        longest = folder.context()
        for key, tokens in _lengths(config):
            if longest is not None and tokens > longest:
                raise ConfigError(f"{key}={tokens}: {folder.name} is made for at most {longest} tokens")


def _lengths(config: Config) -> Iterator[tuple[str, int]]:
    """Numbers of tokens that the model reads in one context, by the key that sets each."""
    stage = config.stage
    if stage is Stage.chat:
        yield "chat.max_tokens", config.chat.max_tokens
    if stage is Stage.export and exporter(config.export.format).bounded:
        yield "export.context", config.export.context
    if stage is Stage.evaluate and config.evaluate.text and config.evaluate.context:
        yield "evaluate.context", config.evaluate.context
    if stage is Stage.evaluate and config.evaluate.answers:
        yield "evaluate.answer_tokens", config.evaluate.answer_tokens
    if stage in (Stage.run, Stage.evaluate):
        yield "evaluate.sample_tokens", config.evaluate.sample_tokens
    if stage in (Stage.chat, Stage.export) or config.cache.path:
        return
    yield "cache.length", config.cache.length
    for number, part in enumerate(mix.parts(config.data)):
        if part.source is DataSource.selfgen:
            where = f"data.parts[{number}]" if config.data.parts else "data"
            yield f"{where}.answer_tokens", part.answer_tokens


def _check_vocabulary(config: Config, called: str, tokens: int) -> None:
    for key, count in (("cache.top_k", config.cache.top_k), ("cache.random", config.cache.random)):
        if count > tokens and not config.cache.path:
            raise ConfigError(f"{key}={count}: {called} has only {tokens} tokens")


def _quants(config: Config) -> list[QuantConfig]:
    """What the students are written in that a run converts, the one that is trained first first."""
    return [*([config.first.quant] if config.first and config.stage is Stage.run else []), config.quant]


def _jobs(config: Config, model: ModelFolder) -> Iterator[Job]:
    """The students of a run, the one that is trained first first."""
    if config.first and config.stage is Stage.run:
        yield Job(select(model.skeleton(), config.first.quant), config.first.mode, config.first.train, "first.")
    start = config.checkpoint.path
    if config.stage is Stage.run or (config.stage is Stage.convert):
        yield Job(select(model.skeleton(), config.quant), config.mode, config.train)
    elif config.stage is Stage.distill and start and (found := find(Path(start).expanduser())).is_dir():
        layers = checkpoints.layers_of(checkpoints.native.opened(found))
        yield Job(layers, config.mode, config.train)


def _check_learning(job: Job) -> None:
    """Checks that at least one kind of parameter in the layers has a learning rate; adapters always have."""
    if job.mode.rank:
        return
    rates = as_plain(job.train.learn)
    learning = [layer for layer in job.layers if learns(job.mode, layer.role, layer.format)]
    kinds = {part.kind for layer in learning for part in layer.format.parts(*layer.shape).values()}
    if not any(rates[kind] for kind in kinds | {LATENT, NORMS}):
        raise ConfigError(f"{job.prefix}train.learn has no rate for {' and '.join(sorted(kinds))}: nothing would learn")


def _check_layers(job: Job, quant: QuantConfig, model: ModelFolder) -> None:
    """Checks that every layer's shape suits its format."""
    for layer in job.layers:
        if misfit := layer.format.misfit(*layer.shape):
            key = f"{job.prefix}{key_of(layer.name, layer.role, quant)}.{misfit.setting}"
            value = layer.format.settings()[misfit.setting]
            raise ConfigError(f"{key}={value}: {layer.name} of {model.name} {misfit.why}")
