"""What every stage works with: the machine, the teacher, the run's record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qat import machine, models
from qat.config import CheckpointConfig, Config
from qat.machine import Machine
from qat.models import ModelFolder
from qat.runs import Run, environment
from qat.stages import limits


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
    """Resolves the machine, finds the teacher, and looks whether the run can work with the two.

    Raises:
        MissingError: one of the two cannot be had.
        ConfigError: a size is beyond the teacher's or the machine's.
    """
    resolved = machine.resolve(config.instance)
    run.result["environment"] = environment(resolved.describe(), resolved.instance)
    teacher = models.locate(config.model, Path(config.outputs) / "artifacts")
    limits.check(config, teacher, resolved)
    return Workspace(config, run, resolved, teacher)


def start_folder(checkpoint: CheckpointConfig) -> Path | None:
    """The folder of the configured checkpoint; None is the teacher itself."""
    return Path(checkpoint.path).expanduser() if checkpoint.path else None
