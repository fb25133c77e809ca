"""Put a checkpoint or a cache into the store."""

from pathlib import Path

from qat.config import Config
from qat.console import console
from qat.report.records import read
from qat.store import transfer
from qat.store.places import open_place


def main(config: Config) -> None:
    """`stage=push`: packs `checkpoint=` or `cache.path=` and puts it there with its checksum."""
    if config.checkpoint.path:
        kind, folder = "checkpoints", Path(config.checkpoint.path).expanduser()
    else:
        kind, folder = "caches", Path(str(config.cache.path)).expanduser()
    place = open_place(config.store)
    place.prepare()
    path = transfer.push(place, folder, kind, config.store.archive or _name(folder))
    console.print(f"{folder} is now {path} in {place.url}", soft_wrap=True)


def _name(folder: Path) -> str:
    """The name of the run for its best or last checkpoint, else the folder's own."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "checkpoints" and (run / "result.json").is_file():
        record = read(run, run.parent)
        return f"{record.run_id}_{record.text('name')}"
    return folder.resolve().name
