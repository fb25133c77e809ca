"""How long conversions took, by where they were made."""

from dataclasses import dataclass, field
from pathlib import Path

from qat import records
from qat.console import duration
from qat.records import Record

NOTED = ("instance", "device", "cores")  # what a manifest says of where it was made


@dataclass
class Times:
    """Conversions of one teacher to one preset, made on one kind of machine.

    Attributes:
        where: instance, device and cores; empty where that is not known.
        name: of the conversions.
        seconds: of those that say it.
        count: of all.
        last: when the newest was made, `2026-11-28 14:03`.
    """

    where: tuple[str, str, str]
    name: str
    seconds: list[float] = field(default_factory=list)
    count: int = 0
    last: str = ""

    def told(self) -> str:
        """`24 s`, `22 s to 26 s`; empty where no time is known."""
        ends = dict.fromkeys(duration(pick(self.seconds)) for pick in (min, max)) if self.seconds else []
        return " to ".join(ends)


def conversions(outputs: Path) -> list[Times]:
    """The times of all conversions of an outputs folder, by instance, device, cores and name."""
    found: dict[tuple[tuple[str, str, str], str], Times] = {}
    for place, manifest in records.manifests(outputs, "checkpoints"):
        if "figures" not in manifest:
            continue
        own = Record(outputs / place, manifest, place)
        instance, device, cores = (own.text("made", key) for key in NOTED)
        name = own.text("name") or Path(place).name
        times = found.setdefault(((instance, device, cores), name), Times((instance, device, cores), name))
        seconds = own.seconds("made", "seconds")
        times.seconds += [] if seconds is None else [seconds]
        times.count += 1
        times.last = max(times.last, own.text("made", "at")[:16].replace("T", " "))
    return sorted(found.values(), key=_order)


def _order(times: Times) -> tuple[str, str, int, str]:
    instance, device, cores = times.where
    return instance, device, int(cores) if cores.isdecimal() and len(cores) < 9 else 0, times.name
