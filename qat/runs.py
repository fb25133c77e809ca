"""Run identity, naming and `result.json`, the contract that logs, reports and sweeps read.

A run is `SR-007` (`qat/identities.py` says where its folder is). Its `result.json` exists from the first
moment with status `interrupted`, so that a run that was killed is recorded as just that. `metrics.jsonl`
beside it has a line for each training step and evaluation.
"""

import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from qat import bounded, console, processes, provenance, system
from qat.artifacts import Artifact, write_json, write_text
from qat.config import Config, Stage, as_plain
from qat.errors import ArtifactError
from qat.identities import RESULT, RUN, claim_run, give_back, note, places, recorded
from qat.installation import INSTALLED
from qat.tracking import Tracker, open_tracker

log = logging.getLogger(__name__)

SCHEMA = 1
ARCHITECTURE = "v2"  # codebook ⊙ low-rank scale, in the run log's naming convention
METRICS = "metrics.jsonl"
LOG = "train.log"  # log file in a run's folder, named in conf/hydra/job_logging/qat.yaml
SAVE_SECONDS = 10.0  # seconds between two writes of `result.json` during training

# Stages that are not runs: they get no identity, no record and no line in the run log.
UNRECORDED = (Stage.chat, Stage.report, Stage.pull, Stage.push, Stage.store, Stage.doctor)


def checkpoint_name(preset: str, mode: str, loss: float | None) -> str:
    """A name in the run log's form, `{arch}_{quant}_{variant}_{loss}_{dtype}`: `v2_q2a4_mlp_0.58_fp32`."""
    shown = "none" if loss is None or not math.isfinite(loss) else f"{loss:.2f}"
    return f"{ARCHITECTURE}_{preset}_{mode}_{shown}_fp32"


class Run:
    """The record of one run, kept in its folder from the first moment.

    Attributes:
        folder: the run's own folder.
        result: the content of `result.json` as it stands.
    """

    def __init__(
        self, config: Config, folder: Path, command: str = "", overrides: Sequence[str] = (), goes_on: bool = False
    ) -> None:
        """Opens the record and writes it with status `interrupted`.

        Args:
            config: the whole configuration, recorded as it is.
            folder: the run's own, which exists; named like the run unless the user chose it.
            command: the command line as it was typed.
            overrides: what it sets for this job.
            goes_on: the folder holds this very run, interrupted: what it was started as stays, times add up.
        """
        self.folder, self._config = folder, config
        self._replaced = _text(folder / RESULT)
        earlier = bounded.said(folder / RESULT) if goes_on else {}
        run_id = _identity(config, folder)
        self.result = _first(config, folder, run_id, command, overrides)
        if earlier:
            self.result |= _as_started(earlier, self.result, overrides)
        self._seconds = {key: float(seconds) for key, seconds in self.result["timing"].items()}
        self._running = {"total_s": time.monotonic()}
        self.save()
        self._metrics = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see finish

    @cached_property
    def _tracker(self) -> Tracker:
        """The tracker, opened only once there is something to report, so that a refused run is not tracked."""
        return open_tracker(self._config, self.folder, self.result["run_id"])

    @property
    def begun(self) -> bool:
        """True once anything was made, trained or measured."""
        return bool(self.result["made"] or self.result["metrics"] or "_tracker" in vars(self))

    def log(self, row: dict[str, float]) -> None:
        """Records the figures of one training step or evaluation; `row` has a `step`."""
        self._metrics.write(json.dumps(_finite(row)) + "\n")
        self._tracker.log(row)
        if time.monotonic() - self._running["total_s"] > SAVE_SECONDS:  # keeps the time spent, should the run be killed
            self.save()

    def rewind(self, rows: int) -> list[dict[str, float]]:
        """Forgets all figures after the first `rows`, which are returned: a resumed run logs the rest again.

        Raises:
            ArtifactError: not so many are whole.
        """
        if not processes.place().first:  # only the first rank keeps the figures
            return []
        path = self.folder / METRICS
        kept = path.read_bytes().splitlines(keepends=True)[:rows]
        read = [bounded.row(line) for line in kept]
        found = [{key: math.nan if value is None else value for key, value in row.items()} for row in read if row]
        if len(found) < rows:
            raise ArtifactError(
                f"{path} has {len(found)} whole rows of the {rows} that were logged when the state was saved from which"
                " this run would go on: begin it again without run.resume"
            )
        self._metrics.truncate(sum(map(len, kept)))
        return found

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds spent inside to `<what>_s`, however it ends."""
        self._running[f"{what}_s"] = time.monotonic()
        try:
            yield
        finally:
            self._count()
            del self._running[f"{what}_s"]

    def uses(self, what: str, artifact: Artifact) -> None:
        """Records that the run made an artifact, or that it is reused: when, where and how long it was made."""
        name = artifact.folder.name
        if artifact.fresh:
            self.result["made"].append(name)
        elif name not in self.result["made"]:
            made = artifact.manifest.get("made")
            self.result["reused"][what] = {"path": str(artifact.folder), "made": made}
            if made:
                self.result["timing"][f"{what}_made_s"] = made["seconds"]
            log.info("%s reused, %s: %s", what, provenance.told(made), artifact.folder)

    def save(self) -> None:
        """Writes the record as it stands; figures that are not finite become null, never NaN."""
        self._count()
        self.result["rates"] |= console.paces.known()
        write_json(self.folder / RESULT, _finite(self.result))

    def finish(self, status: str, error: str | None = None) -> None:
        """Closes the record as `complete`, `failed` or `interrupted`."""
        self.result["status"] = status
        self.result["error"] = error
        try:
            self.save()
            self._metrics.close()
        except OSError as full:  # a full disk may have ended the run; its record already says `interrupted`
            log.warning("%s could not be brought up to date: %s", self.folder / RESULT, full.strerror)
        self._tracker.finish(_finite(self.result["metrics"]), failed=status != "complete")

    def withdraw(self) -> None:
        """Undoes the record of a run that was refused before it did anything, its identity included."""
        self._metrics.close()
        if self._replaced:
            write_text(self.folder / RESULT, self._replaced)
        else:
            (self.folder / RESULT).unlink()
        if not (self.folder / METRICS).stat().st_size:
            (self.folder / METRICS).unlink()
        give_back(Path(self._config.outputs), self.result["run_id"])

    def _count(self) -> None:
        """Brings all times up to now."""
        now = time.monotonic()
        for key, since in self._running.items():
            self._seconds[key] = self._seconds.get(key, 0.0) + now - since
            self._running[key] = now
        self.result["timing"] |= {key: round(seconds, 3) for key, seconds in self._seconds.items()}


def _identity(config: Config, folder: Path) -> str:
    """The identity of a resumed run, or from the folder's name, or a new one; the user's own folder is noted."""
    outputs, earlier = Path(config.outputs), _earlier(config, folder) if config.run.resume else None
    if not processes.place().first:  # other ranks write to a scratch folder
        return folder.name
    run_id = earlier or (folder.name if RUN.fullmatch(folder.name) else claim_run(outputs))
    note(outputs, run_id, folder)
    return run_id


def _earlier(config: Config, folder: Path) -> str | None:
    """The identity of the run in a folder, even if its record is damaged."""
    place = os.path.realpath(folder)
    noted = (run_id for run_id, path in places(Path(config.outputs)) if os.path.realpath(path) == place)
    return recorded(folder) or next(filter(RUN.fullmatch, noted), None)


def owner(folder: Path) -> dict[str, str]:
    """What tells the run in a folder from every other, on other machines too: its identity and when it was started."""
    record = bounded.said(folder / RESULT)
    return {key: str(record.get(key)) for key in ("run_id", "started")}


def record_death(config: Config, folder: Path, command: str, overrides: Sequence[str], error: str) -> None:
    """Closes the record of a run whose process is gone, as failed; makes one where it had not come so far."""
    result = bounded.said(folder / RESULT) or _first(config, folder, folder.name, command, overrides)
    write_json(folder / RESULT, result | {"status": "failed", "error": error})


def _first(config: Config, folder: Path, run_id: str, command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What `result.json` says of a run that has just been started."""
    trains = config.stage in (Stage.run, Stage.distill)
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "name": checkpoint_name(config.quant.name, config.mode.name, None) if trains else "",
        "stage": config.stage.name,
        "status": "interrupted",
        "goal": config.run.goal,
        "notes": config.run.notes,
        "command": command,
        "overrides": list(overrides),
        "config": as_plain(config),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed": [],
        "quant": {"preset": config.quant.name},
        "measured_on": {},
        "metrics": {},
        "verdict": None,
        "timing": {},
        "rates": {},
        "throughput": {},
        "memory": {},
        "made": [],
        "reused": {},
        "paths": {"run": str(folder)},
        "environment": {},
        "error": None,
    }


def _as_started(earlier: dict[str, Any], now: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What stays of an earlier record when its run goes on; the user's own words unless there are new ones."""
    kept = ("command", "overrides", "config", "started", "timing", "memory", "made", "reused", "paths", "goal", "notes")
    said = [text.partition("=")[0].lstrip("+") for text in overrides]
    fitting = {key: earlier[key] for key in (*kept, "resumed") if isinstance(earlier.get(key), type(now[key]))}
    stays = {key: value for key, value in fitting.items() if f"run.{key}" not in said}
    for key in ("timing", "memory"):
        stays[key] = {name: count for name, count in stays.get(key, {}).items() if isinstance(count, int | float)}
    stays["reused"] = {what: found for what, found in stays.get("reused", {}).items() if _is_reuse(found)}
    again = {"started": now["started"], "command": now["command"]}
    return stays | {"resumed": [*stays.get("resumed", []), again]}


def _is_reuse(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("made"), dict | None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def environment(device: str, instance: str = "") -> dict[str, Any]:
    """What the figures were measured with: commit, versions, device."""
    import torch
    import transformers

    return {
        "git": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instance": instance,
        "device": device,
        "cores": system.cores(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of this source tree, with `-dirty` when it was changed; None outside a checkout."""
    if INSTALLED:  # a repository around it is another's
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
