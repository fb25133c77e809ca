"""Stage 4: measures students and shows their answers side by side."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import checkpoints
from qat.artifacts import Artifact, write_text
from qat.cache.reader import CacheReader
from qat.config import Config
from qat.console import console, table
from qat.data.asking import takes_questions
from qat.errors import ConfigError
from qat.evaluate import Comparison, Metrics, answers, compare, samples_of
from qat.evaluate.figures import METHOD, Rows
from qat.evaluate.tasks import STDERR, Harness, Scores
from qat.evaluate.windows import Windows, read
from qat.names import TEACHER, called, checkpoint
from qat.quant.size import summary
from qat.runs import Run
from qat.stages import cache
from qat.stages.workspace import Workspace, open_workspace, start_folder

log = logging.getLogger(__name__)

SAMPLES = "samples.md"
TITLES = {
    True: "The same prompts, answered by each model",
    False: "The same texts, gone on with by each model, which has no chat template that takes a question",
}
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("full KL", "{:.4f}".format),
    "kd_loss": ("KD loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "top1_agreement": ("same first choice", "{:.1%}".format),
}
SIZES = {
    "file_bytes": "MB, packed",
    "model_bits_per_weight": "bits per weight",
    "bits_per_weight": "bits per quantized weight",
}

Models = dict[str, Path | None]  # folder of each model by the name shown to the user; None is the teacher


@dataclass
class Ground:
    """What models are measured on: rows of text, tasks or both."""

    rows: Rows | None = None
    top_k: int = 0
    harness: Harness | None = None


@dataclass
class Found:
    """What was found of one model; `intervals` of its figures, `scores` of tasks."""

    metrics: Metrics | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    quant: dict[str, Any] | None = None


def main(config: Config, run: Run) -> None:
    """`stage=evaluate`: the checkpoint, and those of `evaluate.against`, on the cache, a text or tasks."""
    work = open_workspace(config, run)
    models = _models(config)
    for folder in filter(None, models.values()):
        checkpoints.check(folder, work.teacher)
    ground, on = _ground(work)
    found = _measure(work, ground, models)
    first = next((name for name, folder in models.items() if folder), TEACHER)
    if (metrics := found[first].metrics) is not None:
        run.result["metrics"] |= asdict(metrics)
    run.result["quant"] = found[first].quant or {"preset": None}
    run.result["evaluation"]["on"] = on
    table(f"on {on}", ["", *found], _rows(found))
    if ground.rows is not None:
        console.print(f"± is half of the interval: {METHOD}", soft_wrap=True)
    if ground.harness is not None:
        console.print("± of a task is the harness's standard error times 1.96", soft_wrap=True)


def make(
    work: Workspace, cached: Artifact, folders: dict[str, Path], known: dict[str, Metrics] | None = None
) -> dict[str, Metrics]:
    """Measures each checkpoint on the held-apart split and writes `samples.md`.

    Args:
        work: the run.
        cached: the cache.
        folders: what a person calls each checkpoint, and where it lies.
        known: what was measured before, on the same split.
    """
    found = _measure(work, _held_out(cached), dict(folders), known)
    work.run.result["quant"] = found[list(folders)[-1]].quant
    return {name: metrics for name in folders if (metrics := found[name].metrics) is not None}


def _models(config: Config) -> Models:
    """The configured checkpoint, then what it is compared with, each once; the teacher last unless it is named."""
    given, outputs = start_folder(config.checkpoint), Path(config.outputs)
    named = [given] if given or not config.evaluate.against else []
    named += [checkpoint(word, outputs) for word in config.evaluate.against]
    models: Models = {}
    for folder in named:
        name = called(folder, outputs) if folder else TEACHER
        taken = models.get(name)
        other = folder and taken and os.path.realpath(folder) != os.path.realpath(taken)
        models[str(folder) if other else name] = folder
    return models


def _ground(work: Workspace) -> tuple[Ground, str]:
    """What is measured on, with a phrase for it: a text or tasks where they are asked for, else the cache."""
    settings, said = work.config.evaluate, []
    ground = Ground(top_k=work.config.cache.top_k)
    if not (settings.text or settings.tasks):
        cached = cache.make(work)
        return _held_out(cached), f"held-out text of {cached.folder.name}"
    if settings.text:
        windows = _text(work, settings.text)
        ground.rows = windows
        said.append(f"{settings.text}, windows of {windows.meta['length']} tokens, stride {settings.stride}")
        work.measures_on(windows.text_key(), said[0])
    if settings.tasks:
        ground.harness = Harness(settings.tasks, settings.examples)
        said.append(f"tasks of lm-eval: {', '.join(settings.tasks)}")
    return ground, "; ".join(said)


def _held_out(cached: Artifact) -> Ground:
    held_out = CacheReader(cached, "eval")
    return Ground(held_out, int(held_out.meta["top_k"]))


def _text(work: Workspace, path: str) -> Windows:
    settings, longest = work.config.evaluate, work.teacher.context()
    if longest is not None and settings.context > longest:
        raise ConfigError(
            f"evaluate.context={settings.context}: {work.teacher.name} is made for at most {longest} tokens"
        )
    return Windows(read(path, work.teacher.tokenizer(), settings.tokens), settings.context, settings.stride)


def _measure(
    work: Workspace, ground: Ground, models: Models, known: dict[str, Metrics] | None = None
) -> dict[str, Found]:
    """Measures one model after the other, each recorded at once, and writes `samples.md`."""
    machine, speech = work.machine, Speech(work)
    found: dict[str, Found] = {}
    comparison: Comparison | None = None
    with work.timed("evaluate"):
        teacher = work.teacher.load(machine.dtype, machine.device)
        if ground.rows is not None:
            work.settle(ground.rows, teacher)
        speech.hear(TEACHER, teacher)
        for name, folder in models.items():
            student, quant = _load(work, folder) if folder else (teacher, None)
            found[name] = Found(quant=quant)
            if known and name in known:
                found[name].metrics = known[name]
            elif comparison is not None and folder is None:
                _take(found[name], comparison.of_teacher())
            elif ground.rows is not None:
                comparison = compare(student, teacher, ground.rows, ground.top_k, machine)
                _take(found[name], comparison)
            if ground.harness is not None:
                found[name].scores = ground.harness.run(student, work.teacher.tokenizer(), machine)
            if folder:
                speech.hear(name, student)
            _record(work.run, found)
        if comparison is not None and TEACHER not in found:
            found[TEACHER] = _take(Found(), comparison.of_teacher())
            _record(work.run, found)
        speech.write()
    return found


class Speech:
    """What models say to the same prompts; nothing where there is no tokenizer to speak with."""

    def __init__(self, work: Workspace) -> None:
        self._work, self._said = work, dict[str, list[str]]()
        self._tokenizer = work.teacher.tokenizer() if work.teacher.has_tokenizer() else None
        self._prompts = samples_of(self._tokenizer) if self._tokenizer else {}

    def hear(self, name: str, model: PreTrainedModel) -> None:
        """Lets a model answer."""
        if self._tokenizer is None:
            return
        prompts, tokens = list(self._prompts.values()), self._work.config.evaluate.sample_tokens
        ends, machine = self._work.teacher.ends(), self._work.machine
        self._said[name] = answers(model, self._tokenizer, prompts, ends, tokens, machine)

    def write(self) -> None:
        """Writes `samples.md` and notes where it is."""
        if self._tokenizer is None:
            log.warning("no samples: %s has no tokenizer", self._work.teacher.name)
            return
        path = self._work.run.folder / SAMPLES
        title = TITLES[takes_questions(self._tokenizer)]
        write_text(path, samples(title, list(self._prompts), self._said))
        self._work.run.result["paths"]["samples"] = str(path)


def _take(found: Found, comparison: Comparison) -> Found:
    found.metrics, found.intervals = comparison.metrics(), comparison.intervals()
    return found


def _load(work: Workspace, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    student, manifest = checkpoints.load(folder, work.teacher, work.machine)
    figures = summary(checkpoints.layers_of(manifest), work.teacher.skeleton())
    return student, {"preset": manifest["quant"]["name"], **figures}


def _record(run: Run, found: dict[str, Found]) -> None:
    run.result["evaluation"] = {"interval": METHOD, "models": {name: asdict(one) for name, one in found.items()}}
    run.save()


def _rows(found: dict[str, Found]) -> list[list[str]]:
    """Table rows: figures with half their interval, scores of tasks, bits."""
    models, rows = list(found.values()), []
    if any(one.metrics for one in models):
        rows += [[title, *(_figure(one, key) for one in models)] for key, (title, _) in FIGURES.items()]
    names = {(task, metric): None for one in models for task, scores in one.scores.items() for metric in scores}
    shown = [(task, metric) for task, metric in names if STDERR not in metric]
    rows += [[f"{task} {metric}", *(_score(one, task, metric) for one in models)] for task, metric in shown]
    return [*rows, *([title, *(_size(one, key) for one in models)] for key, title in SIZES.items())]


def _figure(one: Found, key: str) -> str:
    if one.metrics is None:
        return "-"
    shown, interval = FIGURES[key][1], one.intervals.get(key)
    value = shown(getattr(one.metrics, key))
    return (
        value
        if interval is None or interval[0] == interval[1]
        else f"{value} ± {shown((interval[1] - interval[0]) / 2)}"
    )


def _score(one: Found, task: str, metric: str) -> str:
    scores = one.scores.get(task, {})
    if metric not in scores:
        return "-"
    name, comma, kind = metric.partition(",")
    error = scores.get(f"{name}{STDERR}{comma}{kind}")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")


def _size(one: Found, key: str) -> str:
    if one.quant is None:
        return "-"
    return f"{one.quant[key] / 1e6:.1f}" if key == "file_bytes" else f"{one.quant[key]:.2f}"


def samples(title: str, prompts: list[str], said: dict[str, list[str]]) -> str:
    """What each model says to the same prompts, as Markdown."""
    parts = [f"# {title} (most likely tokens, no sampling)\n"]
    for number, prompt in enumerate(prompts):
        parts.append(f"## {prompt}\n")
        for name, texts in said.items():
            quoted = "\n".join(f"> {line}" for line in texts[number].splitlines() or ["(nothing)"])
            parts.append(f"**{name}**\n\n{quoted}\n")
    return "\n".join(parts)
