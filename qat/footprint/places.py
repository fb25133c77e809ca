"""Kinds of memory, what is free of them, and sentences about what does not fit."""

import psutil

from qat import capacity
from qat.console import LINE, size
from qat.footprint import libraries
from qat.footprint.shapes import MODEL, TEACHER, Part, Place
from qat.machine import Machine

LEAD = "memory, expected: "  # what a line of a run's log says before the summary


def places(parts: list[Part], machine: Machine) -> list[Place]:
    """The kinds of memory with the parts that each holds."""
    gpu, host = capacity.device(machine.device), capacity.host()[0] + psutil.swap_memory().free
    if gpu is None:
        return [Place(host, "", parts)]
    return [
        Place(gpu, " on the GPU", [part for part in parts if not part.host], libraries.BESIDE),
        Place(host, "", [part for part in parts if part.host]),
    ]


def told(place: Place) -> str:
    """A phase in a few words: all of it and its largest parts."""
    largest = [part for part in _descending(place) if part.bytes > 0.02 * place.needed()]
    parts = ", ".join(f"{part.what} {size(part.bytes)}" for part in largest)
    return f"{size(place.needed())}{place.where} ({parts})"


def summary(found: dict[str, Place]) -> str:
    """The phase that takes most, with what is free and as many of its parts as a line has room for."""
    most = max(found, key=lambda name: found[name].needed())
    place = found[most]
    said, parts = f"{size(place.needed())} of {size(place.room())} free{place.where}, for {most}", ""
    for part in _descending(place):
        more = f"{parts}{', ' if parts else ''}{part.what} {size(part.bytes)}"
        if len(f"{LEAD}{said} ({more})") > LINE:
            break
        parts = more
    return f"{said} ({parts})" if parts else said


def refusal(phase: str, place: Place, least: bool, keys: list[str]) -> str:
    """What takes most of a phase that does not fit, and which keys to change."""
    largest = [part for part in _descending(place) if part.least or not least][:2]
    parts = " and ".join(f"{size(part.bytes)} for {part.what} ({part.key})" for part in largest)
    own = [part.key for part in largest if part.key not in (MODEL, TEACHER)]
    fixed = [part for part in _descending(place) if part.key in (MODEL, TEACHER) and (part.least or not least)]
    alone = sum(part.bytes for part in fixed) > place.room(least)  # whatever else is changed
    smaller = f"change {own[0]}" if own and not alone else f"choose a smaller {fixed[0].key}"
    change = f"{' '.join(keys)} makes it fit" if keys else smaller
    needs = "needs at least" if least else "is expected to take"
    return (
        f"{phase} {needs} {size(place.needed(least))} of memory{place.where} and {size(place.room(least))} are free:"
        f" {parts}; {change}, or use a machine with more"
    )


def _descending(place: Place) -> list[Part]:
    return sorted(place.parts, key=lambda part: -part.bytes)
