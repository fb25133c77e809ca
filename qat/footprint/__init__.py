"""The memory of a run, computed from shapes before anything is loaded.

A phase has parts. Some must be there at one time whatever is done, each counted once and at its smallest: a run of
which these alone have no room could not have ended, and is refused. With the others, which depend on how work is cut
into pieces, they are what the run is expected to take: that is shown before it starts, and a run of which that has no
room may still end (a GPU's memory is used up to the last byte by smaller micro-batches first, `qat.distill.step`).
Either way the sentence names the cheapest key that makes it fit.

shapes.py        parts, sizes of models, students to be made
activations.py   what decoder layers keep of a token
libraries.py     what is no tensor
preparation.py   text, caches, the comparison of passes
finished.py      evaluation, answers, exports
making.py        conversion and its figures
training.py      a step
phases.py        all of a run
places.py        what is free, and sentences
remedy.py        what makes it fit
"""

import logging

from qat.config import Config
from qat.errors import ConfigError
from qat.footprint.phases import phases
from qat.footprint.places import places, refusal, summary, told
from qat.footprint.remedy import adjusted, remedy
from qat.footprint.shapes import Job, Jobs, Part, Place, Shapes
from qat.machine import Machine

__all__ = [
    "Job",
    "Jobs",
    "Part",
    "Place",
    "Shapes",
    "adjusted",
    "check",
    "expected",
    "phases",
    "places",
    "plan",
    "remedy",
    "summary",
    "told",
]

log = logging.getLogger(__name__)


def check(config: Config, shapes: Shapes, jobs: Jobs, machine: Machine) -> None:
    """Refuses a run that needs more memory than this machine has, and warns of one that is expected to take more.

    Either way the phase is told that is short of most.

    Args:
        config: of the run.
        shapes: of its models.
        jobs: gives the students that a configuration makes or trains.
        machine: that it is to run on.

    Raises:
        ConfigError: what takes most of the memory, and which key to change.
    """
    made = phases(config, shapes, jobs(config), machine)
    held = [(name, place) for name, parts in made for place in places(parts, machine)]
    for least in (True, False):
        short = [(name, place) for name, place in held if not place.fits(least)]
        if not short:
            continue
        name, place = max(short, key=lambda one: one[1].needed(least) - one[1].room(least))
        said = refusal(name, place, least, remedy(config, shapes, jobs, machine, name, least))
        if least:
            raise ConfigError(said)
        log.warning(said)


def expected(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> dict[str, int]:
    """Bytes that each phase is expected to take of what computes: a GPU's memory, else the host's."""
    found: dict[str, int] = {}
    for name, parts in phases(config, shapes, jobs, machine):
        found[name] = max(found.get(name, 0), int(places(parts, machine)[0].needed()))
    return found


def plan(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> dict[str, Place]:
    """What each phase of a run is expected to take, where most is taken for what is free: a GPU, else the host."""
    found: dict[str, Place] = {}
    for name, parts in phases(config, shapes, jobs, machine):
        tightest = max(places(parts, machine), key=lambda place: place.needed() / max(place.free, 1))
        if name not in found or found[name].needed() < tightest.needed():
            found[name] = tightest
    return found
