"""The teacher for writing a cache: loaded once, and computed in the way that was tested to be right.

What was found stands in a note beside unfinished shards, so that whoever goes on with them, or helps, decides alike.
"""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import capacity
from qat.cache.crew import Crew
from qat.fidelity import Sample, ready, settle
from qat.forward import Pass, use
from qat.machine import Machine
from qat.models import ModelFolder
from qat.models.streamed import stream_of

MADE_WITH = ".made_with.json"
COMPILED_TOKENS = 2_000_000  # tokens of a cache from which compiling the teacher saves more time than it takes


class Author:
    """The teacher on this process's device."""

    def __init__(self, teacher: ModelFolder, machine: Machine, crew: Crew, whole: bool = True) -> None:
        """Stores the settings; the model is loaded when it is first needed, as a whole only if `whole` allows it."""
        self.teacher, self.machine, self.crew, self.whole = teacher, machine, crew, whole

    @cached_property
    def model(self) -> PreTrainedModel:
        """The teacher's model; one that is not to be whole, or has little room, is read layer by layer."""
        dtype, device = self.machine.dtype, self.crew.device(self.machine.device)
        weights = sum(parameter.numel() for parameter in self.teacher.skeleton().parameters())
        fits = self.whole and capacity.roomy(weights * dtype.itemsize, device)
        return self.teacher.load(dtype, device) if fits else self.teacher.stream(dtype, device)

    def settle(self, scratch: Path, sample: Sample) -> Pass:
        """How the teacher is computed, from the note in `scratch` if this machine wrote it, else by looking.

        Raises:
            ConfigError, NumericsError: as `qat.fidelity.settle`.
        """
        note = self.noted(scratch)
        if note.items() >= self.machine.made_with().items():
            return Pass(**note["pass"])
        return settle(self.teacher, self.machine, sample, self.model, repack=True)

    def ready(self, how: Pass, sample: Sample, tokens: int) -> PreTrainedModel:
        """The model, compiled if the number of tokens to read makes that worthwhile."""
        use(self.model, how)
        ready(self.model, sample, self._compiled(tokens) and stream_of(self.model) is None)
        return self.model

    def made_with(self, how: Pass, tokens: int) -> dict[str, Any]:
        """Settings that affect the last bits of the outputs; they must be the same for a whole cache."""
        return self.machine.made_with() | {"compiled": self._compiled(tokens), "pass": asdict(how)}

    def noted(self, scratch: Path) -> dict[str, Any]:
        """The content of the note in a folder."""
        note = scratch / MADE_WITH
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        return found

    def _compiled(self, tokens: int) -> bool:
        """Whether compiling the teacher is worth its time."""
        return self.machine.compile and tokens >= COMPILED_TOKENS
