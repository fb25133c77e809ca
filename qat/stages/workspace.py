"""What every stage works with: the machine, the model and its teacher, the run's record."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from qat import machine, models, records
from qat.config import CheckpointConfig, Config, ModelConfig, ModelSource, Stage
from qat.console import duration, paces
from qat.fidelity import Sample, settle
from qat.fidelity.sample import Rows
from qat.forward import Pass
from qat.machine import Machine
from qat.models import ModelFolder
from qat.peaks import peaks
from qat.records import Record
from qat.runs import Run, environment
from qat.stages import limits
from qat.stages.teacher import check

log = logging.getLogger(__name__)

PARTS = ("cache", "first", "convert", "distill", "evaluate", "export")  # of runs, as their times are recorded


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
        try:
            with self.run.timed(what):
                yield
        finally:
            limits.record_taken(self.run)
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
    peaks.begin(resolved.device)
    run.result["environment"] = environment(resolved.describe(), resolved.instance)
    _tell(config, run, resolved)
    asked = None if config.stage is Stage.export else config.teacher  # what a file holds is the student's alone
    model, teacher = models.pair(config.model, asked, Path(config.outputs) / "artifacts")
    check(config, model, teacher, resolved)
    resolved, expected = limits.check(config, model, teacher, resolved)
    limits.record_expected(run, expected)
    return Workspace(config, run, resolved, model, teacher)


def _tell(config: Config, run: Run, resolved: Machine) -> None:
    """What the run will do, in a line, and how long each part took last time, which is what bars begin with."""
    log.info("%s on %s: %s", run.result["run_id"], resolved.describe(), ahead(config))
    earlier = records.last_like(Path(config.outputs), run.result)
    paces.begin(earlier.numbers("rates") if earlier else {})
    if earlier and (parts := [f"{part} {duration(seconds)}" for part, seconds in _spent(earlier)]):
        log.info("last time (%s): %s", earlier.run_id, ", ".join(parts))


def ahead(config: Config) -> str:
    """What a run will do: `tiny, cache, convert to q2a4, distill 40 steps, evaluate`."""
    start = config.checkpoint.path or config.checkpoint.name
    compared = [*([start] if config.checkpoint.path or not config.evaluate.against else []), *config.evaluate.against]
    distilled = f"distill {config.train.steps:,} steps"
    parts = {
        Stage.run: ["cache", f"convert to {config.quant.name}", distilled, "evaluate"],
        Stage.convert: ["cache", f"convert to {config.quant.name}"],
        Stage.distill: ["cache", distilled],
        Stage.export: [f"export {start} as {config.export.name}"],
        Stage.evaluate: [f"evaluate {', '.join(compared)}"],
    }
    pair = " taught by ".join(_called(one) for one in (config.model, config.teacher) if one is not None)
    return ", ".join([pair, *parts.get(config.stage, [config.stage.name])])


def _called(model: ModelConfig) -> str:
    """What a person calls a model: of a folder that has no option its own name."""
    return Path(str(model.path)).name if model.source is ModelSource.folder else model.name


def _spent(earlier: Record) -> Iterator[tuple[str, float]]:
    """The parts of a run with their seconds; of what it reused, those of its making."""
    for part in PARTS:
        spent = "made_s" if earlier.section("reused", part) else "s"
        if (seconds := earlier.seconds("timing", f"{part}_{spent}")) is not None:
            yield part, seconds


def start_folder(checkpoint: CheckpointConfig) -> Path | None:
    """The folder of the configured checkpoint; None is the teacher itself."""
    return Path(checkpoint.path).expanduser() if checkpoint.path else None
