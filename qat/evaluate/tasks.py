"""Tasks of lm-eval, run by its own harness on a model of ours; the package is the extra `lm_eval`.

A task is one that the harness knows by name, a YAML file in its format, or one of the package's own
(`qat.evaluate.local`). Tasks by name mostly fetch their data from the hub; a file may name data on disk.

Models that converse are asked through their chat template, without thoughts, examples before the question being turns
of the conversation: what `lm_eval --apply_chat_template --model_args enable_thinking=False,…` does.
"""

import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.errors import ConfigError, MissingError, NumericsError, reason
from qat.evaluate import local
from qat.machine import Machine
from qat.quant.linear import baked
from qat.suggest import did_you_mean

SUFFIXES = (".yaml", ".yml")
STDERR = "_stderr"

Scores = dict[str, dict[str, float]]  # by task, then by metric; a metric's standard error as `<metric>_stderr`


class Harness:
    """Some tasks, found and with their data at hand."""

    def __init__(
        self, tasks: list[str], examples: int | None = None, chat: bool = False, fewshot: int | None = None
    ) -> None:
        """Looks the tasks up and loads their data.

        Args:
            tasks: names, or paths of YAML files.
            examples: of each task, at most; None takes all.
            chat: asks through the tokenizer's chat template.
            fewshot: examples shown before each question; None takes as many as a task says.

        Raises:
            ConfigError: there is no such task, or its file is none.
            MissingError: its data cannot be had.
        """
        with _quiet():
            from lm_eval.tasks import TaskManager

            tasks = [file for task in tasks for file in local.files_of(task)]
            self._tasks, self._examples, self._chat, self._fewshot = tasks, examples, chat, fewshot
            # The harness's own index has 14,000 files, so it is not read for paths alone.
            self._manager = TaskManager(include_defaults=not all(task.endswith(SUFFIXES) for task in tasks))
            for task in tasks:
                self._look_up(task)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, machine: Machine) -> Scores:
        """Scores of a model; the standard errors are the harness's own.

        Raises:
            NumericsError: a score is no number.
        """
        with _quiet(), baked(model, machine.dtype):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            beside: Any = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=machine.micro_batch,
                trust_remote_code=False,
                enable_thinking=False if self._chat else None,
            )
            asked: Any = list(self._tasks)
            found = simple_evaluate(
                model=beside,
                tasks=asked,
                task_manager=self._manager,
                limit=self._examples,
                num_fewshot=self._fewshot,
                apply_chat_template=self._chat,
                fewshot_as_multiturn=self._chat,
                log_samples=False,
            )
        scores = {name: _numbers(figures) for name, figures in found["results"].items()}
        for name, figures in scores.items():
            if wrong := [metric for metric, score in figures.items() if STDERR not in metric and math.isnan(score)]:
                raise NumericsError(f"evaluate.tasks: {name} gives no {wrong[0]}: none of its examples counts")
        return scores

    def _look_up(self, task: str) -> None:
        from datasets.exceptions import DatasetsError
        from yaml import YAMLError

        known = self._manager.all_tasks
        if not task.endswith(SUFFIXES) and task not in known:
            like = did_you_mean(task, known)
            raise ConfigError(
                f"evaluate.tasks: lm-eval knows no task {task}{like}; a task of your own is named by its YAML file"
            )
        try:
            self._manager.load([task])
        except OSError as error:  # a file or the hub failed; ConnectionError is an OSError
            raise MissingError(f"evaluate.tasks: the data of {task} cannot be had ({reason(error)})") from None
        except (DatasetsError, YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"evaluate.tasks: lm-eval cannot load {task} ({reason(error)})") from None


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Metrics by name; the harness adds the filter, which most tasks have none of: `acc,none`."""
    numbers = {key: value for key, value in figures.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and its data library say much about what they do anyway, and draw bars into any log."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
