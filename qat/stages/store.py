"""List what the store holds."""

from qat.config import Config
from qat.console import table
from qat.store.places import describe, open_place


def main(config: Config) -> None:
    """`stage=store`."""
    place = open_place(config.store)
    table(place.url, ["name", "size"], describe(place.entries()))
