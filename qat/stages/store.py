"""List what the store holds, each thing with the name that it has here."""

from pathlib import Path

from qat import names
from qat.config import Config
from qat.console import console, size
from qat.records import LOSSES, Record, manifests
from qat.store.names import is_offered, own
from qat.store.places import Entry, open_place


def main(config: Config) -> None:
    """`stage=store`: path there, size, registered name, and the loss of what was pulled, a line each."""
    place, outputs = open_place(config.store), Path(config.outputs)
    here = {Path(where).name: Record(outputs, said, where) for where, said in manifests(outputs, "checkpoints")}
    rows = [_row(entry, here) for entry in place.entries()]
    console.say("", whole=place.url, style="bold")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(map(str.ljust, row, widths)).rstrip(), soft_wrap=True)


def _row(entry: Entry, here: dict[str, Record]) -> list[str]:
    name = own(entry) if is_offered(entry) and not entry.name.endswith(".pt") else ""
    option = names.registered(name) or names.registered(name, "cache") or ""
    pulled = next((here[alias] for alias in names.aliases(option or name) if alias in here), None)
    loss = pulled.first(*LOSSES) if pulled else None
    shown = "folder" if entry.size is None else size(entry.size)
    return [entry.path, shown, option, "" if loss is None else f"KD loss {loss:.4f}"]
