"""Telling Weights & Biases about a run; `metrics.jsonl` in the run's folder stays the truth.

Without a login wandb runs offline, writes below the run's folder, never asks and never fails the run. Stages that
train, convert or measure are told of, each a wandb run whose job type is the stage. An evaluation is in the group of
the run whose checkpoint it measures, and jobs of a sweep are in the sweep's. Caches and exports have no figures.
"""

import logging
import netrc
import os
import re
import shlex
from collections.abc import Callable
from configparser import ConfigParser
from configparser import Error as SettingsError
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from qat import names
from qat.config import Config, Stage, TrackerKind, as_plain
from qat.errors import QatError
from qat.shown import near, shown

log = logging.getLogger(__name__)

UNTOLD = (Stage.cache, Stage.export)  # stages of which wandb is not told
HOST = "api.wandb.ai"
LOGIN = "`wandb login` (--host=URL for one of your own)"  # what comes before an offline run is sent


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

    def __init__(self, run: Any, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._silent = False

    def log(self, row: dict[str, float]) -> None:
        """Figures under the row's own step."""
        figures = {key: value for key, value in row.items() if key != "step"}
        self._tell(lambda: self._run.log(figures, step=int(row["step"])))

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Closes the run, so that the next one in this process is a run of its own; says how to send an offline one."""
        self._tell(lambda: self._run.summary.update(summary))
        self._tell(lambda: self._run.finish(exit_code=int(failed)))
        if copies := offline(self._folder):
            here = [Path(near(copy)) for copy in copies]
            log.info("wandb kept this run offline; to send it, %s, then `%s`", LOGIN, sync(here))

    def _tell(self, do: Callable[[], object]) -> None:
        """Calls wandb; after its first error, which is logged once, it is not called again."""
        if self._silent:
            return
        try:
            do()
        except Exception as error:
            self._silent = True
            log.warning("wandb is told no more of this run: %s: %s", type(error).__name__, error)


def open_tracker(config: Config, folder: Path, run_id: str) -> Tracker:
    """What is told of a run; where wandb itself fails the run goes on without it, and says so."""
    if config.tracker.kind is TrackerKind.none or config.stage in UNTOLD:
        return NoTracker()
    try:
        return WandbTracker(_start_wandb(config, folder, run_id), folder)
    except Exception as error:  # a service, a client process and the network may all fail here
        log.warning("wandb is left out of this run: %s", error)
        return NoTracker()


# For example offline-run-20260131_120000-x1y2z3a4; a second run in the same second gets a number behind it.
RUN_FOLDER = re.compile(r"(offline-)?run-\d+_\d+-(?P<id>[^-]+)(-\d+)?")


def _start_wandb(config: Config, folder: Path, run_id: str) -> Any:
    import wandb

    earlier = _earlier_id(folder)
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    return wandb.init(
        project=config.tracker.project,
        id=earlier,
        resume="allow" if earlier else None,
        name=run_id,
        group=shown(_group(config, folder, run_id)),
        job_type=config.stage.name,
        config=as_plain(config),
        dir=str(folder),
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", init_timeout=30),
    )


def _group(config: Config, folder: Path, run_id: str) -> str:
    """The sweep that a run is a job of, else the run itself; of an evaluation those of the run that it measures."""
    measured = _measured(config) if config.stage is Stage.evaluate else None
    home, name = (measured, measured.name) if measured else (folder, run_id)
    return home.parent.name if home.parent.name.startswith("sweep-") else name


def _measured(config: Config) -> Path | None:
    """The folder of the run whose student is measured; None for any other model."""
    try:
        place = names.start(config)
    except QatError:  # the stage says what is wrong with it
        return None
    return names.run_of(place.resolve()) if place else None


def _earlier_id(folder: Path) -> str | None:
    """What wandb called this run when it was interrupted, so that it stays one run."""
    names = sorted(path.name for path in (folder / "wandb").glob("*run-*-*"))
    found = [match for name in names if (match := RUN_FOLDER.fullmatch(name))]
    return found[-1]["id"] if found else None


def offline(folder: Path) -> list[Path]:
    """What wandb kept of the run in a folder and has not sent yet, oldest first."""
    copies = (path for path in sorted((folder / "wandb").glob("offline-run-*")) if RUN_FOLDER.fullmatch(path.name))
    return [path for path in copies if any(path.glob("*.wandb")) and not any(path.glob("*.wandb.synced"))]


def sync(copies: list[Path]) -> str:
    """The command that sends them."""
    return shlex.join(["wandb", "sync", *map(str, copies)])


def logged_in() -> bool:
    """True where wandb has a key for the host that it would tell, which is looked for and never read out."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(_netrc()).authenticators(host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def host() -> str:
    """The host that wandb tells, with its port where it has one: `WANDB_BASE_URL`, or what `wandb login` noted."""
    noted = ConfigParser(interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    try:
        noted.read(Path(folder).expanduser() / "settings", encoding="utf-8")
    except (SettingsError, UnicodeDecodeError):
        noted = ConfigParser()
    named = os.environ.get("WANDB_BASE_URL") or noted.get("default", "base_url", fallback=None)
    return urlsplit(named or "").netloc or HOST


def _netrc() -> Path:
    """The file of logins that wandb reads."""
    return Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
