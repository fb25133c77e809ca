"""`-m` and `sweep.resume=`: from a checked command line to a planned sweep, and from its end to the table."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from qat import gpus, identities, names, sweeps
from qat.cli.arguments import CommandLine, quote
from qat.cli.folders import check_free
from qat.config import Config, as_plain
from qat.errors import ConfigError, QatError, UnavailableError
from qat.installation import to_install
from qat.plans import FLAGS
from qat.shaping import flat, is_neutral
from qat.shown import shown
from qat.suggest import did_you_mean, one_line
from qat.sweeps import Sweep

RESUME = "sweep.resume"
OUTPUTS = "outputs"
SWEEPER = "hydra_plugins.qat_sweeper.PlannedSweeper"
PACKAGE = Path(__file__).resolve().parents[1]
# Import paths for this process and its jobs: this checkout, and its plugins for Hydra.
IMPORTED = [str(PACKAGE.parent), str(PACKAGE / "plugins")]
# Launchers beyond Hydra's own, and the extra of this project that installs each.
EXTRAS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray"}
LAUNCHERS = ("hydra/launcher", "hydra.launcher.")


def resumed(command: CommandLine) -> Sweep | None:
    """The sweep that `sweep.resume=<folder>` names; None without these words.

    Raises:
        ConfigError: there is no such plan, or beside it stands what would make it another sweep.
    """
    named = command.values(RESUME)
    if not named or named[-1] in ("", "null"):
        return None
    sweep = _load(names.sweep(named[-1], command.outputs))
    _check_options(sweep, command)
    for text in changes(command):
        if not _may_change(text):
            raise _would_change(sweep, text)
    return sweep


def _load(folder: Path) -> Sweep:
    try:
        return sweeps.load(folder)
    except QatError as error:
        raise ConfigError(str(error)) from None


def _check_options(sweep: Sweep, command: CommandLine) -> None:
    """Checks that a user's own options come from the command line; only a plan may name a recorded run."""
    own = sweep.own_options()
    if own and _plain(command.flags) != sweep.flags:
        raise ConfigError(
            f"{sweep.folder} was planned with {' '.join(own)}: options of your own are read only if you name them"
            " again, so say so beside sweep.resume"
        )


def _may_change(override: str) -> bool:
    """True for settings of where and how jobs run, not of what they compute or (`run`) what they are called."""
    name = override.lstrip("+").partition("=")[0]
    return name.startswith(LAUNCHERS) or (is_neutral(name) and not name.startswith(("run", "sweep", "outputs")))


def check_launcher(parsed: list[Override], options: list[str]) -> None:
    """Checks that Hydra finds the launcher here.

    Raises:
        UnavailableError: its plugin is not installed.
        ConfigError: there is no such launcher.
    """
    for override in parsed:
        if override.key_or_group != "hydra/launcher" or override.value() in options:
            continue
        name = str(override.value())
        if name in EXTRAS:
            raise UnavailableError(f"hydra/launcher={name} is not installed: {to_install(EXTRAS[name])}")
        known = sorted({*options, *EXTRAS})
        raise ConfigError(f"hydra/launcher={name}: no such launcher{did_you_mean(name, known)}; use {', '.join(known)}")


def is_hydras(override: str) -> bool:
    """True for an override of Hydra's own settings, which are no part of a job."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def changes(command: CommandLine) -> list[str]:
    """The overrides beside `sweep.resume` and the outputs folder."""
    return [text for text in command.overrides if text.lstrip("+").partition("=")[0] not in (RESUME, OUTPUTS)]


def at_home(sweep: Sweep, command: CommandLine, planned: Config) -> list[str]:
    """The override that keeps a sweep in the outputs folder it was made with, where its plan leads elsewhere from here.

    Args:
        sweep: the plan.
        command: may name that very folder.
        planned: the first job as the plan has it.

    Raises:
        ConfigError: the command line names another folder.
    """
    leads_to = Path(planned.outputs).resolve()
    home = sweep.outputs if sweep.outputs and sweep.outputs.is_dir() else leads_to
    if command.values(OUTPUTS) and command.outputs.resolve() != home:
        raise _would_change(sweep, f"{OUTPUTS}={command.outputs}")
    return [] if leads_to == home else [f"{OUTPUTS}={quote(str(home))}"]


def _would_change(sweep: Sweep, text: str) -> ConfigError:
    return ConfigError(
        f"{text} would change the sweep in {sweep.folder}: it goes on as planned; beside sweep.resume only what never"
        " changes a result can be set, such as instance, store, tracker and hydra/launcher"
    )


def check_unchanged(sweep: Sweep, configs: list[Config]) -> None:
    """Checks that the plan still composes to the configurations that it was made from.

    Raises:
        ConfigError: a file in `conf/` or a default has changed since.
    """
    for job, config in zip(sweep.jobs, configs, strict=True):
        if sweeps.key_of(config) != job.key:
            raise ConfigError(
                f"{sweep.folder} was planned with another configuration than {job.run_id} has now: options in conf/"
                " or defaults have changed since, so what is complete there would not compare; start a new sweep"
            )


def plan(command: CommandLine, typed: str, configs: list[Config], jobs: list[list[str]], folder: Path | None) -> Sweep:
    """The sweep of a command line: the unfinished one of the same jobs if there is one, else a new one.

    Args:
        command: flags and overrides.
        typed: the command as it was typed.
        configs: of each job.
        jobs: overrides of each job.
        folder: where the user wants it, if he says so.
    """
    keys = [sweeps.key_of(config) for config in configs]
    for first, second in itertools.combinations(range(len(keys)), 2):
        if keys[first] == keys[second]:
            raise _alike(configs[first], configs[second])
    outputs = Path(configs[0].outputs)
    if folder is not None and os.path.isfile(folder / sweeps.PLAN):
        there = _load(folder)
        if [job.key for job in there.jobs] != keys:
            raise ConfigError(f"{folder} holds another sweep: choose another folder, or go on with {RESUME}={folder}")
        return there
    if folder is not None:
        check_free("hydra.sweep.dir", folder)
    known = None if folder else sweeps.find(outputs, keys)
    if known is not None:
        done = len(known.jobs) - len(known.remaining())
        print(shown(f"{known.folder} is this sweep and goes on: {done} of {len(known.jobs)} jobs are complete"))
        return known
    own = [[text for text in job if not is_hydras(text)] for job in jobs]
    try:
        return sweeps.create(folder, outputs, typed, _plain(command.flags), dict(zip(keys, own, strict=True)))
    except OSError as error:
        raise ConfigError(f"outputs={configs[0].outputs} cannot be written: {error.strerror}") from error


def _alike(one: Config, other: Config) -> ConfigError:
    """Why two jobs would be the same: all values are, or those in which they differ change nothing."""
    settings = dict(flat(as_plain(other)))
    differing = [key for key, value in flat(as_plain(one)) if settings.get(key) != value]
    if not differing:
        return ConfigError("two jobs of this sweep are configured alike: a value is listed twice")
    return ConfigError(
        f"two jobs of this sweep differ only in {', '.join(differing)}, which never changes a result: leave it out"
    )


def for_hydra(sweep: Sweep, command: CommandLine, parallel: bool) -> list[str]:
    """The overrides with which Hydra runs what is left of a sweep."""
    words = [text for text in command.overrides if is_hydras(text)]
    words += [f"hydra.sweep.dir={quote(str(sweep.folder))}", f"hydra.sweeper._target_={SWEEPER}"]
    found = len(gpus.visible())
    if parallel and found and not any(word.startswith("hydra.launcher.n_jobs=") for word in words):
        words.append(f"hydra.launcher.n_jobs={found}")
    return [*sweep.jobs[0].overrides, *words]


@contextmanager
def importable() -> Iterator[None]:
    """Lets this process and those that a launcher starts import the sweeper, whatever their current directory."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*IMPORTED, before]))
    sys.path[:] = [*(path for path in sys.path if path not in IMPORTED), *IMPORTED]
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run(sweep: Sweep, launch: Callable[[], None]) -> int:
    """Runs what is left and tells what came of it; returns the exit code, 0 only when all jobs are complete."""
    with sweeps.held(sweep), importable():
        identities.sweep(sweep.outputs or sweep.folder.parent)
        _register()
        try:
            launch()
        finally:
            conclude(sweep)
    return 1 if sweep.remaining() else 0


def _register() -> None:
    """Shows the sweeper to Hydra, which looked for such classes when the command line was composed."""
    from hydra.core.plugins import Plugins
    from hydra_plugins.qat_sweeper import PlannedSweeper

    Plugins.instance().register(PlannedSweeper)


def tell_of_job(config: Config) -> None:
    """What became of its sweep, after a job of one went on by itself."""
    if config.run.resume:
        folder = names.run(config.run.resume, Path(config.outputs))
        if sweeps.has_job(folder):
            conclude(sweeps.load(folder.parent))


def conclude(sweep: Sweep) -> None:
    """The table, best first; which jobs failed and why; how to go on with what is left."""
    from qat.console import console, table

    try:
        summary = sweeps.summarize(sweep)
    except (OSError, QatError) as error:
        one_line(error)
        return
    table(sweep.folder.name, *sweeps.cells(summary))
    if remark := sweeps.remark(summary):
        console.say(remark)
    for job, reason in sweep.failures():
        console.say(f"{job.run_id} failed: {reason}")
    left, again = sweeps.how_to_go_on(sweep)
    console.say(left or "summary.md, summary.json and sweep.png are in", whole=again or str(sweep.folder))


def _plain(flags: dict[str, Any]) -> dict[str, str]:
    """The flags that decide what composes, folders whole."""
    said = {name: str(flags[name]) for name in FLAGS if flags.get(name)}
    as_it_is = {name for name, text in said.items() if name == "config_name" or "://" in text}
    return {name: text if name in as_it_is else os.path.abspath(text) for name, text in said.items()}
