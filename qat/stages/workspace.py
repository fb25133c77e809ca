"""What every stage works with: the machine, the model and its teacher, the run's record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from qat import machine, models
from qat.config import CheckpointConfig, Config, Stage
from qat.fidelity import Sample, settle
from qat.fidelity.sample import Rows
from qat.forward import Pass
from qat.machine import Machine
from qat.models import ModelFolder
from qat.runs import Run, environment
from qat.stages import limits
from qat.stages.teacher import check


@dataclass(frozen=True)
class Workspace:
    """A configured run with everything that stages share.

    Attributes:
        config: of the run.
        run: its record.
        machine: that computes.
        model: the weights that are quantized, which a student has all others from.
        teacher: writes text, fills caches, and is what a student is compared with; the model itself unless
            configured.
    """

    config: Config
    run: Run
    machine: Machine
    model: ModelFolder
    teacher: ModelFolder

    @property
    def artifacts(self) -> Path:
        """Where artifacts are kept."""
        return Path(self.config.outputs) / "artifacts"

    def context(self) -> int | None:
        """Tokens that both models were made to see at once; None where neither says so."""
        return min(filter(None, (self.model.context(), self.teacher.context())), default=None)

    def settle(self, which: ModelFolder, rows: Rows, model: PreTrainedModel | None = None) -> Pass:
        """How the model or its teacher is computed over such rows, looked for unless this job knows.

        Args:
            which: of the two.
            rows: of one length.
            model: it, if it is loaded.

        Raises:
            ConfigError, ArtifactError, NumericsError: as `qat.fidelity.settle`.
        """
        if model is None and self.config.stage is Stage.convert:  # which never holds all of the teacher
            model = which.stream(self.machine.dtype, self.machine.device)
        sample = Sample.of_rows(rows)
        if which.fingerprint != self.teacher.fingerprint:  # a cache says what the teacher says
            sample = replace(sample, recorded=None)
        return settle(which, self.machine, sample, model)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds spent inside to the record, as `<what>_s`, and saves it."""
        memory = self.run.result["memory"]
        try:
            with self.run.timed(what):
                yield
        finally:
            memory["peak_bytes"] = max(memory.get("peak_bytes", 0), machine.peak_bytes(self.machine.device))
        self.run.save()

    def measures_on(self, text: str, called: str) -> None:
        """Records what figures of this run are of, since only those of one teacher and text compare."""
        teacher = {"name": self.teacher.name, "fingerprint": self.teacher.fingerprint}
        self.run.result["measured_on"] = {"teacher": teacher, "text": text, "called": called}


def open_workspace(config: Config, run: Run) -> Workspace:
    """Resolves the machine, finds the models, and looks whether they can do what is asked and have room there.

    Raises:
        MissingError: one of them cannot be had.
        ConfigError: a model cannot, the two do not have the same tokens, or a size is beyond them or the machine.
    """
    resolved = machine.resolve(config.instance)
    run.result["memory"]["start_bytes"] = machine.peak_bytes(resolved.device)
    run.result["environment"] = environment(resolved.describe(), resolved.instance)
    asked = None if config.stage is Stage.export else config.teacher  # what a file holds is the student's alone
    model, teacher = models.pair(config.model, asked, Path(config.outputs) / "artifacts")
    check(config, model, teacher, resolved)
    run.result["memory"]["planned_bytes"] = limits.check(config, model, teacher, resolved)
    return Workspace(config, run, resolved, model, teacher)


def start_folder(checkpoint: CheckpointConfig) -> Path | None:
    """The folder of the configured checkpoint; None is the teacher itself."""
    return Path(checkpoint.path).expanduser() if checkpoint.path else None
