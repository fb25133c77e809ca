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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.artifacts import write_json
from qat.config import Config, Stage, as_plain
from qat.identities import RESULT, RUN, claim_run, note, recorded
from qat.tracking import open_tracker

log = logging.getLogger(__name__)

SCHEMA = 1
ARCHITECTURE = "v2"  # table ⊙ low-rank scale, in the run log's naming convention
METRICS = "metrics.jsonl"

# Stages that are no runs: no identity, no record, no line in the log.
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

    def __init__(self, config: Config, folder: Path, command: str = "", overrides: Sequence[str] = ()) -> None:
        """Opens the record and writes it with status `interrupted`.

        Args:
            config: the whole configuration, recorded as it is.
            folder: the run's own, which exists; named like the run unless the user chose it.
            command: the command line as it was typed.
            overrides: what it sets for this job.
        """
        self.folder = folder
        self._started = time.monotonic()
        run_id = _identity(config, folder)
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "run_id": run_id,
            "name": checkpoint_name(config.quant.name, config.mode.name, None),
            "stage": config.stage.name,
            "status": "interrupted",
            "goal": config.run.goal,
            "notes": config.run.notes,
            "command": command,
            "overrides": list(overrides),
            "config": as_plain(config),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "quant": {"preset": config.quant.name},
            "metrics": {},
            "timing": {},
            "throughput": {},
            "memory": {},
            "paths": {"run": str(folder)},
            "environment": {},
            "error": None,
        }
        self.save()
        self._metrics = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see finish
        self._tracker = open_tracker(config, folder, run_id)

    def log(self, row: dict[str, float]) -> None:
        """Records the figures of one training step or evaluation; `row` has a `step`."""
        self._metrics.write(json.dumps(_finite(row)) + "\n")
        self._tracker.log(row)

    def rewind(self, rows: int) -> list[dict[str, float]]:
        """Forgets all figures after the first `rows`, which are returned: a resumed run logs the rest again."""
        path = self.folder / METRICS
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        self._metrics.truncate(sum(len(line.encode()) for line in kept))
        return [{key: math.nan if value is None else value for key, value in json.loads(row).items()} for row in kept]

    def save(self) -> None:
        """Writes the record as it stands; figures that are not finite become null, never NaN."""
        self.result["timing"]["total_s"] = round(time.monotonic() - self._started, 3)
        write_json(self.folder / RESULT, _finite(self.result))

    def finish(self, status: str, error: str | None = None) -> None:
        """Closes the record as `complete`, `failed` or `interrupted`."""
        self.result["status"] = status
        self.result["error"] = error
        try:
            self.save()
            self._metrics.close()
        except OSError as full:  # the disk may be what ended the run; `interrupted` is already on it
            log.warning("%s could not be brought up to date: %s", self.folder / RESULT, full.strerror)
        self._tracker.finish(_finite(self.result["metrics"]), failed=status != "complete")


def _identity(config: Config, folder: Path) -> str:
    """That of the run that is gone on with, of the folder's name, or a new one; noted where the folder is its own."""
    outputs, earlier = Path(config.outputs), recorded(folder) if config.run.resume else None
    if os.environ.get("RANK", "0") != "0":  # beside the first process, in a scratch folder
        return folder.name
    run_id = earlier or (folder.name if RUN.fullmatch(folder.name) else claim_run(outputs))
    note(outputs, run_id, folder)
    return run_id


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured with: commit, versions, device."""
    import torch
    import transformers

    return {
        "git": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of this source tree, with `-dirty` when it was changed; None outside a checkout."""
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
