"""Telling Weights & Biases about a run; `metrics.jsonl` in the run's folder stays the truth.

Without a login wandb runs offline, writes below the run's folder, never asks and never fails the run.
"""

import logging
import netrc
import os
from pathlib import Path
from typing import Any, Protocol

from qat.config import Config, TrackerKind, as_plain

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Is told about a run while it goes on and when it ends."""

    def log(self, row: dict[str, float]) -> None:
        """Figures of one training step; `row` has a `step`."""

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """The final figures."""


class NoTracker:
    """Tells nobody."""

    def log(self, row: dict[str, float]) -> None:
        """Nothing."""

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Nothing."""


class WandbTracker:
    """One wandb run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, row: dict[str, float]) -> None:
        """Figures under the row's own step."""
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Closes the run, so that the next one in this process is a run of its own."""
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(failed))


def open_tracker(config: Config, folder: Path, run_id: str) -> Tracker:
    """The configured tracker; where wandb itself fails the run goes on without it, and says so."""
    if config.tracker.kind is TrackerKind.none:
        return NoTracker()
    import wandb

    try:
        return WandbTracker(_start_wandb(config, folder, run_id))
    except (wandb.errors.Error, OSError) as error:
        log.warning("wandb is left out of this run: %s", error)
        return NoTracker()


def _start_wandb(config: Config, folder: Path, run_id: str) -> Any:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    return wandb.init(
        project=config.tracker.project,
        name=run_id,
        config=as_plain(config),
        dir=str(folder),
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", init_timeout=30),
    )


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
