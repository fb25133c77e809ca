"""From the words typed to a running job; everything is checked before anything is created."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override

from qat import sweeps
from qat.cli import (
    arguments,
    checkpoints,
    checks,
    completion,
    inherited,
    job,
    overrides,
    ranks,
    recorded,
    registered,
    resume,
    streams,
    sweeping,
)
from qat.cli.arguments import CommandLine
from qat.cli.checks.outputs import check_folder
from qat.cli.compose import MISTAKES, Composer, explain, typed
from qat.cli.folders import claim
from qat.cli.helping import page
from qat.cli.job import failures
from qat.cli.words import quoted
from qat.config import Config
from qat.errors import ConfigError, QatError, RankError
from qat.processes import launcher, place, started
from qat.runs import UNRECORDED
from qat.suggest import one_line
from qat.sweeps import Sweep

TASKS = "evaluate.tasks"
SUFFIXES = (".yaml", ".yml")  # endings of task files; other values of evaluate.tasks are names that lm-eval knows


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: recorded, with what is complete kept."""


@dataclass
class Checked:
    """A command line after all checks; its `overrides` are in the form that Hydra wants."""

    parsed: list[Override]
    configs: list[Config]  # one configuration per job, in order
    jobs: list[list[str]] | None = None  # the overrides of each job of a sweep; None if its sweeper draws them
    folder: Path | None = None  # the folder that the command line names for the run or the sweep


def main(argv: list[str], launch: Callable[[], None]) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the words typed after the command.
        launch: the function under `hydra.main`, which reads `sys.argv`.
    """
    job.words[:] = argv
    streams.outlive_readers()
    try:
        with _told_by_sigterm():
            ranks.outlive_nobody()
            return _main(argv, launch)
    except QatError as error:
        if ranks.speaks(error):
            one_line(error)
        return error.exit_code
    except KeyboardInterrupt as stop:
        if place().first and launcher() is None:
            print("interrupted", file=sys.stderr)
        return ranks.TERMINATED if isinstance(stop, Terminated) else ranks.INTERRUPTED


def check(command: CommandLine) -> Checked:
    """Composes and checks a command line; creates nothing.

    Raises:
        ConfigError: the first mistake in it, in one sentence.
    """
    composer = Composer(command.flags)
    command.overrides = checkpoints.rewrite(command.overrides, composer.options)
    parsed = overrides.read(command.overrides, composer, command.multirun)
    command.overrides = [str(override.input_line) for override in parsed]
    if command.multirun:
        return _check_sweep(command, parsed, composer)
    command.overrides += inherited.words(command.overrides, composer)
    config = _check_job(command, command.overrides, composer)
    return Checked(parsed, [config], folder=_named_folder("run", command, parsed, composer))


def check_resumed(command: CommandLine, sweep: Sweep) -> Checked:
    """The same for `sweep.resume=`: the jobs of the plan, with what is changed about how they run.

    Raises:
        ConfigError: they would not be the same jobs.
    """
    command.flags |= sweep.flags | {"multirun": True}
    composer = Composer(command.flags)
    parsed = overrides.read(sweeping.changes(command), composer, multirun=True)
    sweeping.check_launcher(parsed, composer.options("hydra/launcher"))
    home = sweeping.at_home(sweep, command, typed(composer.compose(sweep.jobs[0].overrides)))
    command.overrides = [str(override.input_line) for override in parsed]
    changes = [*home, *(text for text in command.overrides if not sweeping.is_hydras(text))]
    jobs = [sweeps.changed(planned.overrides, changes) for planned in sweep.jobs]
    configs = [_check_job(command, job, composer) for job in jobs]
    composer.compose([*jobs[0], *command.overrides], multirun=True)
    sweeping.check_unchanged(sweep, configs)
    sweep.jobs[:] = [replace(planned, overrides=job) for planned, job in zip(sweep.jobs, jobs, strict=True)]
    return Checked(parsed, configs, jobs, sweep.folder)


def _main(argv: list[str], launch: Callable[[], None]) -> int:
    command = arguments.parse(argv)
    if command.flags["help"]:
        return _print(page(command.overrides))
    if command.flags["shell_completion"] and command.overrides[0].startswith("query="):
        shell = command.overrides[0].removeprefix("query=")
        return _print(completion.answer(shell, os.environ.get("COMP_LINE", "")))
    going_on = sweeping.resumed(command) if command.starts_jobs else None
    if going_on:
        checked = check_resumed(command, going_on)
    elif not command.flags["shell_completion"]:
        checked = check(command)
    if command.starts_jobs:
        for config in checked.configs:
            registered.check(config)
        if checked.jobs is not None:
            job.check(checked.configs)
            return _sweep(command, checked, going_on, launch)
        first = checked.configs[0]
        if resume.is_complete(first):
            return _print(resume.conclude(first)) if place().first else 0
        devices = 1 if first.stage in UNRECORDED else first.instance.devices
        if devices > 1 and not started():
            return ranks.launch(argv, devices)
        if not command.multirun:  # a sweeper that draws may draw what is looked at
            job.check([first])
        command.overrides += claim(first, checked.folder, command.multirun)
    sys.argv[1:] = command.argv()
    launch()
    if command.starts_jobs and place().first:
        sweeping.tell_of_job(first)
    return _exit_code(command.multirun)


def _print(text: str) -> int:
    """Prints a page, of which a reader such as `head` may want the beginning alone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the rest of the output is discarded; otherwise Python would complain when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _sweep(command: CommandLine, checked: Checked, going_on: Sweep | None, launch: Callable[[], None]) -> int:
    """Runs a planned sweep, or what is left of it."""
    assert checked.jobs is not None
    line = job.command_line(job.words)
    sweep = going_on or sweeping.plan(command, line, checked.configs, checked.jobs, checked.folder)
    joblib = any("launcher=joblib" in text for text in command.overrides)
    command.overrides = sweeping.for_hydra(sweep, command, joblib)
    sys.argv[1:] = command.argv()
    return sweeping.run(sweep, launch)


def _check_sweep(command: CommandLine, parsed: list[Override], composer: Composer) -> Checked:
    """Checks every job of a sweep; a sweeper that draws values as it goes is checked on what is fixed."""
    sweeping.check_launcher(parsed, composer.options("hydra/launcher"))
    whole = composer.compose(command.overrides, multirun=True)
    folder = _named_folder("sweep", command, parsed, composer)
    if "basic_sweeper" not in whole.hydra.sweeper._target_:
        fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        taken = inherited.words(fixed, composer)
        command.overrides += taken
        fixed += taken
        return Checked(parsed, [_check_job(command, fixed, composer)], folder=folder)
    listed_there = (whole.hydra.sweeper.params or {}).items()
    swept = [quoted(f"{key}={value}", swept=True) for key, value in listed_there]
    listed = overrides.read([*swept, *command.overrides], composer, multirun=True)
    jobs = [[*job, *inherited.words(job, composer)] for job in overrides.jobs(listed)]
    configs = [_check_job(command, job, composer) for job in jobs]
    if configs[0].stage in UNRECORDED:
        raise ConfigError(f"stage={configs[0].stage.name} is no run and cannot be swept: leave out -m")
    return Checked(parsed, configs, jobs, folder)


def _check_job(command: CommandLine, job: list[str], composer: Composer) -> Config:
    config = typed(composer.compose(job))
    if command.starts_jobs:  # flags that only print may be used with an incomplete configuration
        checks.check(config)
        _check_tasks(config, command)
        resume.check(config)
        if config.run.resume and command.multirun:
            raise ConfigError(f"run.resume={config.run.resume} goes on with one run: leave out -m")
    return config


def _check_tasks(config: Config, command: CommandLine) -> None:
    """A file of tasks may name code, which lm-eval runs: one that a record names is not taken from there."""
    told = not (recorded.is_meant(command.flags) or command.values(sweeping.RESUME)) or command.values(TASKS)
    for task in map(os.path.expanduser, [] if told else config.evaluate.tasks):
        if task.endswith(SUFFIXES):
            raise ConfigError(
                f"{TASKS}={task} comes from what was recorded, and such a file may have code run: say {TASKS} yourself"
                " if you trust it, and of a sweep its own command instead of sweep.resume"
            )


def _named_folder(of: str, command: CommandLine, parsed: list[Override], composer: Composer) -> Path | None:
    """The folder of the run or the sweep where the command line names one, which Hydra would take as it is."""
    key = f"hydra.{of}.dir"
    if not any(override.key_or_group == key for override in parsed):
        return None
    whole, holder = composer.compose(command.overrides, command.multirun), HydraConfig.instance()
    holder.set_config(whole)  # needed to resolve `${hydra:…}`
    try:
        folder = str(whole.hydra[of].dir)
    except MISTAKES as error:
        raise ConfigError(f"{key}: {explain(error)}") from error
    finally:
        holder.cfg = None
    check_folder(key, folder)
    return Path(folder)


def _exit_code(multirun: bool) -> int:
    if not failures:
        return 0
    return 1 if multirun else failures[0].exit_code


@contextmanager
def _told_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, as Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    if isinstance(sys.exc_info()[1], RankError):
        return  # already ending; torchrun ends the others when one is gone, and the first error is to be reported
    raise Terminated("stopped by SIGTERM")
