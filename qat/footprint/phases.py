"""The phases of a run in order, each with the memory that it holds."""

from collections.abc import Iterator

from qat.config import Config, Stage
from qat.footprint.finished import chat, evaluation, export, measures_rows
from qat.footprint.making import conversion
from qat.footprint.preparation import cache, comparison, reads, text
from qat.footprint.shapes import Job, Part, Shapes
from qat.footprint.training import comparisons, training
from qat.machine import Machine
from qat.peaks import ANSWERS, CACHE, COMPARISON, EVALUATION, EXPORT, TEXT, TRAINING

RECORDS = (Stage.run, Stage.cache, Stage.convert, Stage.distill)  # stages that make a cache if there is none


def phases(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> Iterator[tuple[str, list[Part]]]:
    """All of a run that may take the most; one name may come more than once."""
    stage, larger = config.stage, max((shapes, shapes.taught_by[0]), key=lambda one: one.weights)
    if stage in RECORDS and not config.cache.path:
        for parts in text(config, shapes, machine):
            yield TEXT, parts
        yield CACHE, cache(config, shapes, machine)
    if stage in RECORDS or (stage is Stage.evaluate and measures_rows(config)):
        yield COMPARISON, comparison(config, larger, machine, reads(config, larger, machine))
    if stage in (Stage.run, Stage.convert):
        for job in jobs:
            yield from conversion(job, config, shapes, machine)
    if stage in (Stage.run, Stage.distill):
        for job in jobs:
            for parts in comparisons(job, config, shapes, machine):
                yield COMPARISON, parts
            for parts in training(job, config, shapes, machine):
                yield TRAINING, parts
    if stage in (Stage.run, Stage.evaluate):
        for parts in evaluation(jobs, config, shapes, machine):
            yield EVALUATION, parts
    if stage is Stage.export:
        yield EXPORT, export(jobs, config, shapes, machine)
    if stage is Stage.chat:
        yield ANSWERS, chat(jobs, config, shapes, machine)
