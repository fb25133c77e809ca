"""Fetch a named checkpoint, cache or run from the store."""

from difflib import get_close_matches
from pathlib import Path

from qat.config import Config
from qat.console import console
from qat.errors import MissingError
from qat.store import names, transfer
from qat.store.places import open_place


def main(config: Config) -> None:
    """`stage=pull`: the archive named by `store.archive`, or the registered checkpoint.

    Raises:
        MissingError: the store has nothing of that name.
    """
    wanted = [config.store.archive] if config.store.archive else names.checkpoint_names(config.checkpoint)
    place = open_place(config.store)
    entries = place.entries()
    found = names.find(entries, wanted)
    if found is None:
        near = get_close_matches(wanted[0], names.known(entries), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise MissingError(f"{wanted[0]} is not in {place.url}{hint}; stage=store lists what is there")
    folder = transfer.pull(place, entries, found, Path(config.outputs), names.kind_of(wanted[0]))
    console.print(f"{wanted[0]} is now {folder}", soft_wrap=True)
