"""List what the store holds, each thing with the name that it has here."""

from pathlib import Path

from qat import names
from qat.config import Config
from qat.console import size, table
from qat.report.records import LOSSES, Record, manifests
from qat.store.names import is_offered, own
from qat.store.places import Entry, open_place


def main(config: Config) -> None:
    """`stage=store`."""
    place, outputs = open_place(config.store), Path(config.outputs)
    here = {Path(where).name: Record(outputs, said, where) for where, said in manifests(outputs, "checkpoints")}
    rows = [_row(entry, here) for entry in place.entries()]
    table(place.url, ["in the store", "size", "name here", "KD loss"], rows)


def _row(entry: Entry, here: dict[str, Record]) -> list[str]:
    """A registered name, and the loss of what was pulled, as its own configuration gives it."""
    name = own(entry) if is_offered(entry) else ""
    option = names.registered(name) or names.registered(name, "cache") or ""
    found = next((here[alias] for alias in names.aliases(option or name) if alias in here), None)
    loss = found.first(*LOSSES) if found else None
    shown = "folder" if entry.size is None else size(entry.size)
    return [entry.path, shown, option or (name if found else ""), "" if loss is None else f"{loss:.4f}"]
