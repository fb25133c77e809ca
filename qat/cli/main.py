"""From the words typed to a running job; everything is checked before anything is created."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from hydra.core.override_parser.types import Override

from qat.cli import arguments, checkpoints, overrides, ranks, resume, unavailable, validate
from qat.cli.arguments import CommandLine
from qat.cli.compose import Composer, typed
from qat.cli.folders import claim
from qat.cli.helping import page
from qat.cli.job import failures
from qat.cli.suggest import one_line
from qat.config import Config
from qat.errors import ConfigError, QatError

INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclass
class Checked:
    """What a command line that can run comes down to; its `overrides` are now as Hydra wants them."""

    parsed: list[Override]
    configs: list[Config]  # of each job, in order


def main(argv: list[str], launch: Callable[[], None]) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the words typed after `launch.py`.
        launch: the function under `hydra.main`, which reads `sys.argv`.
    """
    try:
        return _main(argv, launch)
    except QatError as error:
        one_line(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def check(command: CommandLine) -> Checked:
    """Composes and checks a command line; creates nothing.

    Raises:
        ConfigError: the first mistake in it, in one sentence.
    """
    composer = Composer(command.flags)
    command.overrides = checkpoints.rewrite(
        command.overrides, composer.options("checkpoint"), lambda: _outputs(command, composer)
    )
    parsed = overrides.read(command.overrides, composer, command.multirun)
    command.overrides = [str(override.input_line) for override in parsed]
    _check_folders(parsed)
    return Checked(parsed, _check_jobs(command, parsed, composer))


def _main(argv: list[str], launch: Callable[[], None]) -> int:
    command = arguments.parse(argv)
    if command.flags["help"]:
        print(page())
        return 0
    if not command.flags["shell_completion"]:
        checked = check(command)
    if command.starts_jobs:
        for config in checked.configs:
            unavailable.check(config)
        devices = checked.configs[0].instance.devices
        if devices > 1 and not ranks.started():
            return ranks.launch(argv, devices)
        command.overrides += claim(checked.configs[0], checked.parsed, command.multirun)
    sys.argv[1:] = command.argv()
    launch()
    return _exit_code(command.multirun)


def _check_jobs(command: CommandLine, parsed: list[Override], composer: Composer) -> list[Config]:
    """Checks every job the command line stands for and returns their configurations."""
    if not command.multirun:
        return [_check_job(command, command.overrides, composer)]
    whole = composer.compose(command.overrides, multirun=True)
    if "basic_sweeper" not in whole.hydra.sweeper._target_:  # others draw values as they go
        fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        return [_check_job(command, fixed, composer)]
    swept = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
    parsed = overrides.read([*swept, *command.overrides], composer, multirun=True)
    return [_check_job(command, job, composer) for job in overrides.jobs(parsed)]


def _check_job(command: CommandLine, job: list[str], composer: Composer) -> Config:
    config = typed(composer.compose(job))
    if command.starts_jobs:  # a configuration may be looked at before it is complete
        validate.check(config)
        resume.check(config)
        if config.run.resume and command.multirun:
            raise ConfigError(f"run.resume={config.run.resume} goes on with one run: leave out -m")
    return config


def _check_folders(parsed: list[Override]) -> None:
    """Folders that the user names for Hydra, which would fail on them with a traceback."""
    for override in parsed:
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir"):
            validate.check_folder(override.key_or_group, str(override.value()))


def _outputs(command: CommandLine, composer: Composer) -> str:
    """The outputs folder, before anything else is settled."""
    plain = [text for text in command.overrides if text.startswith("outputs=")]
    return str(composer.compose(plain).outputs)


def _exit_code(multirun: bool) -> int:
    if not failures:
        return 0
    return 1 if multirun else failures[0].exit_code
