"""Fetch named checkpoints, caches or runs from the store."""

from pathlib import Path

from qat import names, transfer
from qat.config import Config
from qat.console import console
from qat.errors import MissingError
from qat.report import log as run_log
from qat.store import names as store_names
from qat.store.places import Entry, Place, open_place
from qat.suggest import did_you_mean


def main(config: Config) -> None:
    """`stage=pull`: what `store.archive` names, or the named checkpoint and cache.

    Raises:
        MissingError: the store has nothing of that name.
    """
    place = open_place(config.store)
    entries = place.entries()
    for kind, wanted in _wanted(config):
        folder = _pull(config, place, entries, kind, wanted)
        console.say(f"{wanted[0]} is now", whole=str(folder))
    run_log.refresh(Path(config.outputs))


def _wanted(config: Config) -> list[tuple[str, list[str]]]:
    """Kind and names of each thing to fetch."""
    given, archive = config.checkpoint, config.store.archive
    if archive:
        return [(store_names.kind_of(archive), [archive])]
    word, found = given.path or given.name, []
    if word != names.TEACHER:
        found.append((store_names.kind_of(word), names.aliases(word, given.archive)))
    if cache := names.cache_names(config):
        found.append(("caches", cache))
    return found


def _pull(config: Config, place: Place, entries: list[Entry], kind: str, wanted: list[str]) -> Path:
    found = store_names.find(entries, wanted)
    if found is None:
        hint = did_you_mean(wanted[0], store_names.known(entries))
        raise MissingError(f"{wanted[0]} is not in {place.url}{hint}; stage=store lists what is there")
    name = "" if config.store.archive else wanted[0]
    return transfer.pull(place, entries, found, Path(config.outputs), kind, name=name)
