"""Checks that everything that is measured or compared with exists."""

import importlib.util
import os
from pathlib import Path

from qat import names
from qat.cli import trusted
from qat.cli.schema import written
from qat.config import Config, EvaluateConfig, Stage
from qat.config.evaluate import WINDOW
from qat.errors import ConfigError, UnavailableError
from qat.installation import to_install

# What is measured on, an example, and the keys that say how.
PARTS = (
    ("text", "<file>", ("context", "stride", "tokens")),
    ("tasks", "[local]", ("examples", "chat", "fewshot")),
)


def check(config: Config) -> None:
    """Checks what is measured, what it is compared with, and the tasks."""
    evaluate = config.evaluate
    for key in ("against", "text", "tasks", "answers"):
        if getattr(evaluate, key) and config.stage is not Stage.evaluate:
            raise ConfigError(f"evaluate.{key} goes with stage=evaluate")
    _check_text(evaluate)
    if config.stage is Stage.evaluate:
        _check_idle(evaluate)
    for name in evaluate.against:
        try:
            names.checkpoint(name, Path(config.outputs))
        except ConfigError as error:
            raise ConfigError(f"evaluate.against={error}") from error
    _check_tasks(evaluate.tasks)


def _check_idle(evaluate: EvaluateConfig) -> None:
    """Refuses settings of what is not measured."""
    for what, example, keys in PARTS:
        found = next((key for key in keys if getattr(evaluate, key) is not None), None)
        if found and not getattr(evaluate, what):
            raise ConfigError(
                f"evaluate.{found}={written(getattr(evaluate, found))}: means nothing without evaluate.{what}, as in"
                f" evaluate.{what}={example}"
            )


def _check_text(evaluate: EvaluateConfig) -> None:
    """Checks that the file exists, and that the windows cover all of it."""
    if evaluate.text and not os.path.isfile(os.path.expanduser(evaluate.text)):
        raise ConfigError(f"evaluate.text={evaluate.text}: no such file")
    context = evaluate.context or WINDOW
    if evaluate.stride is not None and evaluate.stride > context:
        raise ConfigError(
            f"evaluate.stride={evaluate.stride} is longer than evaluate.context={context}: tokens between two windows"
            " would not be scored"
        )


def _check_tasks(tasks: list[str]) -> None:
    """Checks that lm-eval is installed and that task files exist."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UnavailableError(f"evaluate.tasks needs lm-eval: run `{to_install('lm_eval')}`")
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            continue
        if not os.path.isfile(os.path.expanduser(task)):
            raise ConfigError(f"evaluate.tasks={task}: no such file")
        # A file of tasks may make lm-eval run code.
        trusted.refuse_data(Path(os.path.expanduser(task)), f"evaluate.tasks={task}")
