"""What every stage works with: the machine, the teacher, the run's record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """A configured run with everything that stages share."""

    config: Config
    run: Run
    machine: Machine
    teacher: ModelFolder

    @property
    def artifacts(self) -> Path:
        """Where artifacts are kept."""
        return Path(self.config.outputs) / "artifacts"

    def settle(self, rows: Rows, model: PreTrainedModel | None = None) -> Pass:
        """How the teacher is computed over such rows, looked for unless this job knows.

        Args:
            rows: of one length.
            model: the teacher, if it is loaded.

        Raises:
            ConfigError, ArtifactError, NumericsError: as `qat.fidelity.settle`.
        """
        if model is None and self.config.stage is Stage.convert:  # which never holds all of the teacher
            model = self.teacher.stream(self.machine.dtype, self.machine.device)
        return settle(self.teacher, self.machine, Sample.of_rows(rows), model)

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
    """Resolves the machine, finds the teacher, and looks whether it can do what is asked and the machine can hold it.

    Raises:
        MissingError: one of the two cannot be had.
        ConfigError: the teacher cannot, or a size is beyond it or the machine.
    """
    resolved = machine.resolve(config.instance)
    run.result["memory"]["start_bytes"] = machine.peak_bytes(resolved.device)
    run.result["environment"] = environment(resolved.describe(), resolved.instance)
    teacher = models.locate(config.model, Path(config.outputs) / "artifacts")
    check(config, teacher, resolved)
    run.result["memory"]["planned_bytes"] = limits.check(config, teacher, resolved)
    return Workspace(config, run, resolved, teacher)


def start_folder(checkpoint: CheckpointConfig) -> Path | None:
    """The folder of the configured checkpoint; None is the teacher itself."""
    return Path(checkpoint.path).expanduser() if checkpoint.path else None
