"""The whole state of training on disk: from it a killed run goes on to the same numbers, bit for bit.

A state is written while training goes on: its tensors are first copied into memory, then a thread of its
own writes them. It appears whole or not at all, the newest `keep` stay, and a damaged one is passed over.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.artifacts import discard, open_artifact, publish
from qat.errors import ArtifactError

log = logging.getLogger(__name__)

FILE = "state.safetensors"


@dataclass(frozen=True)
class State:
    """Training after `step` steps: tensors by name, and plain facts (the best loss so far, rows logged …)."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class States:
    """The states in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Nothing is read or made yet."""
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(1, "state")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Starts writing a copy of the state; waits first for the one before it."""
        self.wait()
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.tensors.items()}
        self._pending = self._writer.submit(self._write, State(state.step, copies, state.facts))

    def wait(self) -> None:
        """Returns when everything is on disk, and raises what went wrong on the way."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def newest(self) -> State | None:
        """The newest state that is whole."""
        for folder in reversed(self._folders()):
            try:
                facts = open_artifact(folder).manifest
                return State(int(facts["step"]), load_file(folder / FILE), facts)
            except ArtifactError as error:
                log.warning("%s: going on from the state before it", error)
        return None

    def _write(self, state: State) -> None:
        with publish(self.folder / f"state-{state.step:08d}", {"kind": "state", "step": state.step, **state.facts}) as (
            made,
            _,
        ):
            save_file(state.tensors, made / FILE)
        for folder in self._folders()[: -self.keep]:
            discard(folder)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("state-*"))


def random_state() -> dict[str, Tensor]:
    """The generators' states, as tensors."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(tensors: dict[str, Tensor]) -> None:
    """Takes over what `random_state` gave, as far as this machine has the generators."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
