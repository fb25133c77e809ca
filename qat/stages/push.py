"""Put a checkpoint or a cache into the store."""

from pathlib import Path

from qat import names, transfer
from qat.artifacts import MANIFEST, read_manifest
from qat.checkpoint_files import STATE_DICTS, find
from qat.config import Config
from qat.console import console
from qat.records import read
from qat.store.places import open_place


def main(config: Config) -> None:
    """`stage=push`: packs `checkpoint=`, else the cache, and puts it there with its checksum."""
    start = names.start(config)
    if start is not None:
        kind, source, name = "checkpoints", find(start), _name(start, Path(config.outputs))
    else:
        source = Path(str(names.cached(config)))
        kind, name = "caches", source.resolve().name
    place = open_place(config.store)
    place.prepare()
    path = transfer.push(place, source, kind, config.store.archive or name)
    console.say(f"{source} is now {path} in", whole=place.url)


def _name(start: Path, outputs: Path) -> str:
    """Of a run's checkpoint its identity and what the run calls it; else its own name."""
    called, source = names.called(start, outputs), find(start)
    run = names.run_of(start)
    if run is not None:
        made = read_manifest(source).get("name") if (source / MANIFEST).is_file() else None
        return f"{called.replace('/', '_')}_{made or read(run, run.parent).text('name')}"
    if called != str(start):
        return called
    return start.resolve().parent.name if start.name in STATE_DICTS else start.resolve().name.removesuffix(".pt")
