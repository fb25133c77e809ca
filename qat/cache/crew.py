"""The processes of one torchrun, which write one cache together.

Files decide everything: the first process holds the cache's lock, prepares its folder and calls the
others to it; each writes the shards that are its turn; the first waits for all of them and publishes.
No process group is needed, so this works beside any that training may want. When a process dies,
torchrun ends the others, and the next start goes on with the shards that are there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qat import processes
from qat.artifacts import POLL_SECONDS, write_text
from qat.console import waiting
from qat.processes import Ranks

ALONE = Ranks()
CALL = ".crew"


@dataclass(frozen=True)
class Crew:
    """This process's place among those of its torchrun; alone without one.

    Attributes:
        ranks: its place.
        name: what only this crew is called.
    """

    ranks: Ranks = ALONE
    name: str = ""

    @classmethod
    def here(cls) -> "Crew":
        """The crew of this process."""
        return cls(processes.place(), processes.name()) if processes.started() else cls()

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process, where it works on GPUs."""
        several = device.type == "cuda" and self.ranks.count > 1
        return torch.device("cuda", self.ranks.local) if several else device

    def takes(self, number: int) -> bool:
        """True where it is this process's turn."""
        return number % self.ranks.count == self.ranks.rank

    def call(self, folder: Path) -> None:
        """Called by the first process: marks the folder as ready."""
        if self.ranks.count > 1:
            write_text(folder / CALL, self.name)

    def called(self, folder: Path) -> bool:
        """True once the first process of this crew has marked the folder as ready."""
        try:
            return (folder / CALL).read_text(encoding="utf-8") == self.name
        except FileNotFoundError:
            return False

    def wait(self, done: Callable[[], bool], why: str) -> None:
        """Waits for the others."""
        if done():
            return
        with waiting(why) as still:
            while not done():
                still()
                time.sleep(POLL_SECONDS)
