"""The processes of one torchrun, which make one cache together.

Files decide everything: the first process holds the cache's lock, prepares its folder and calls the
others to it; each writes the shards that are its turn; the first waits for all of them and publishes.
No process group is needed, so this works beside any that training may want. When a process dies,
torchrun ends the others, and the next start goes on with the shards that are there.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qat.artifacts import POLL_SECONDS, write_text
from qat.console import waiting

CALL = ".crew"


@dataclass(frozen=True)
class Crew:
    """This process's place among those of its torchrun; alone without one.

    Attributes:
        rank: from 0.
        size: processes in all.
        local_rank: from 0 on this host; the number of the GPU to use.
        name: what only this crew is called.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    name: str = ""

    @classmethod
    def here(cls) -> "Crew":
        """The crew of this process, as torchrun describes it in the environment."""
        if "RANK" not in os.environ:
            return cls()
        rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        # torchrun is the parent of all, and a restart of its workers is counted.
        restart, port = (os.environ.get(key, "") for key in ("TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"))
        name = f"{os.getppid()}:{port}:{restart}:{size}"
        return cls(rank, size, local, name)

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process, where it works on GPUs."""
        return torch.device("cuda", self.local_rank) if device.type == "cuda" and self.size > 1 else device

    def takes(self, number: int) -> bool:
        """True where it is this process's turn."""
        return number % self.size == self.rank

    def call(self, folder: Path) -> None:
        """The first process says that the folder is ready."""
        if self.size > 1:
            write_text(folder / CALL, self.name)

    def called(self, folder: Path) -> bool:
        """True once the first process of this crew has said so."""
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
