"""The whole state of training on disk: a killed run continues from it with the same numbers, bit for bit.

A state is written while training goes on: its tensors are copies in memory, which a thread of its own
writes. It appears whole or not at all, the newest `keep` stay, and a damaged one is passed over. Each says
which run it is of, and is restored by that run alone.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qat import bounded, tensor_files
from qat.artifacts import MANIFEST, discard, open_artifact, publish
from qat.distill.parameters import Parameter
from qat.errors import ArtifactError
from qat.tensor_files import Wanted, difference, known

log = logging.getLogger(__name__)

FILE = "state.safetensors"


@dataclass(frozen=True)
class State:
    """Training after `step` steps: tensors by name, in host memory, and plain facts (the best loss so far, rows …)."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def misfit(state: State, parameters: list[Parameter]) -> str:
    """How a state's tensors differ from the parameters of a training; empty where they match."""
    number = Wanted(("F32",), ())
    wanted = {"scaler.scale": number, "scaler.good": number}
    for parameter in parameters:
        whole = Wanted(("F32",), tuple(parameter.value.shape))
        wanted[f"parameter.{parameter.name}"] = whole
        if state.step:
            adam = {"step": number, "exp_avg": whole, "exp_avg_sq": whole}
            wanted |= {f"adam.{parameter.name}.{part}": one for part, one in adam.items()}
    found = {name: known(value) for name, value in state.tensors.items() if name != "random.cuda"}
    return difference(found, wanted | {"random.cpu": Wanted(("U8",), tuple(torch.get_rng_state().shape))})


class States:
    """The states of one run in a folder."""

    def __init__(self, folder: Path, keep: int, whose: dict[str, str]) -> None:
        """Prepares the folder's states without reading any; `whose` identifies the run."""
        self.folder, self.keep, self.whose = folder, keep, whose
        self._writer = ThreadPoolExecutor(1, "state")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Starts writing the state, whose tensors nobody changes; waits first for the one before it."""
        self.wait()
        self._pending = self._writer.submit(self._write, state)

    def wait(self) -> None:
        """Waits until everything is on disk, and raises an error that occurred while writing."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def newest(self) -> State | None:
        """The newest undamaged state of the run."""
        for folder in reversed(self._folders()):
            try:
                facts = open_artifact(folder).manifest
                if facts.get("whose") == self.whose:
                    return State(facts["step"], tensor_files.read(folder / FILE, None, f"delete {folder}"), facts)
                log.warning("%s is of another run, or does not say whose it is: it is not gone on from", folder)
            except ArtifactError as error:
                log.warning("%s: going on from the state before it", error)
        return None

    def _write(self, state: State) -> None:
        described = {"kind": "state", "whose": self.whose, "step": state.step, **state.facts}
        with publish(self.folder / f"state-{state.step:08d}", described) as (made, _):
            save_file(state.tensors, made / FILE)
        self.thin()

    def thin(self) -> None:
        """Removes the run's states except the newest `keep`, and unfinished ones left by a killed process."""
        own = [path for path in self._folders() if bounded.said(path / MANIFEST).get("whose") == self.whose]
        for folder in own[: -self.keep]:
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
    """Restores what `random_state` returned, for the generators that this machine has."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
