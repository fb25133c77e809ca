"""Stage 4: measures students and shows their answers side by side."""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import checkpoints, plots, system
from qat.artifacts import Artifact, write_text
from qat.cache.reader import CacheReader
from qat.config import Config
from qat.config.evaluate import WINDOW
from qat.console import console, table
from qat.data.asking import takes_questions
from qat.errors import ConfigError
from qat.evaluate import Comparison, Metrics, compare, samples_of
from qat.evaluate import answers as answered
from qat.evaluate.figures import Rows
from qat.evaluate.free import FreeRunning
from qat.evaluate.intervals import METHOD
from qat.evaluate.tasks import Harness
from qat.evaluate.windows import Windows, read
from qat.names import TEACHER, called, checkpoint
from qat.peaks import EVALUATION, peaks
from qat.quant import adapter
from qat.quant.size import summary
from qat.runs import Run
from qat.shown import near
from qat.stages import cache
from qat.stages.found import Found, answers, figures, positions
from qat.stages.workspace import Workspace, open_workspace, start_folder

log = logging.getLogger(__name__)

SAMPLES, POSITIONS, ANSWERS = "samples.md", "positions.png", "answers.html"
TITLES = {
    True: "The same prompts, answered by each model",
    False: "The same texts, gone on with by each model, which has no chat template that takes a question",
}
Models = dict[str, Path | None]  # folder of each model by the name shown to the user; None is the teacher


@dataclass
class Ground:
    """What models are measured on: rows of text, tasks, prompts."""

    rows: Rows | None = None
    top_k: int = 0
    harness: Harness | None = None
    free: FreeRunning | None = None


def main(config: Config, run: Run) -> None:
    """`stage=evaluate`: the checkpoint, and those of `evaluate.against`, on the cache, a text or tasks."""
    work = open_workspace(config, run)
    models = _models(config)
    for folder in filter(None, models.values()):
        checkpoints.check(folder, work.model)
    ground, on = _ground(work)
    found = _measure(work, ground, models)
    first = next((name for name, folder in models.items() if folder), TEACHER)
    run.result["metrics"] |= found[first].figures()
    run.result["quant"] = found[first].quant or {"preset": None}
    run.result["evaluation"]["on"] = on
    table(f"on {on}", ["", *found], figures(found))
    _show_positions(run, found, on)
    _show_answers(run, found, ground.free)
    if ground.rows is not None:
        console.say(f"± is half of the interval: {METHOD}")
    if ground.harness is not None:
        console.say("± of a task is the harness's standard error times 1.96")


def _show_positions(run: Run, found: dict[str, Found], on: str) -> None:
    """The KL of students by the position in a document, as a table and a picture, where rows are long enough."""
    students = {name: one for name, one in found.items() if one.positions}
    if not students:
        return
    table("full KL by tokens that come before", ["", *students], positions(students))
    picture = run.folder / POSITIONS
    plots.kl_by_position({name: one.curve for name, one in students.items()}, f"on {on}", picture)
    run.result["paths"]["positions"] = str(picture)
    console.say("picture of it:", whole=near(picture))


def _show_answers(run: Run, found: dict[str, Found], free: FreeRunning | None) -> None:
    """What is told of answers, as a table, and the answers side by side on a page."""
    if free is None:
        return
    page = run.folder / ANSWERS
    write_text(page, free.page())
    run.result["paths"]["answers"] = str(page)
    table(f"answers to {len(free.prompts)} prompts", ["", *found], answers(found))
    console.say("± is 1.96 standard errors; the answers side by side:", whole=near(page))


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
    """What is measured on, with a phrase for it: a text, tasks or prompts where they are asked for, else the cache."""
    settings, said = work.config.evaluate, []
    ground = Ground(top_k=work.config.cache.top_k)
    if not settings.apart:
        cached = cache.make(work)
        return _held_out(cached), f"held-out text of {cached.folder.name}"
    if settings.text:
        windows = _text(work, settings.text)
        ground.rows = windows
        said.append(f"{settings.text}, {windows}")
        work.measures_on(windows.text_key(), said[0])
    if settings.tasks:
        chat = _chats(work)
        ground.harness = Harness(settings.tasks, settings.examples, chat, settings.fewshot)
        how = [*(["as chat"] if chat else []), *([f"{settings.fewshot} examples before"] if settings.fewshot else [])]
        said.append(", ".join([f"tasks of lm-eval: {', '.join(settings.tasks)}", *how]))
    if settings.answers:
        ground.free = FreeRunning(work.teacher, settings.answers, settings.answer_tokens, work.machine)
        said.append(f"answers to {len(ground.free.prompts)} prompts, at most {settings.answer_tokens} tokens long")
    return ground, "; ".join(said)


def _chats(work: Workspace) -> bool:
    """Whether tasks are asked through the chat template."""
    wanted, there = work.config.evaluate.chat, takes_questions(work.teacher.tokenizer())
    if wanted and not there:
        raise ConfigError(f"evaluate.chat=true: {work.teacher.name} has no chat template that takes a question")
    return there if wanted is None else wanted


def _held_out(cached: Artifact) -> Ground:
    held_out = CacheReader(cached, "eval")
    return Ground(held_out, int(held_out.meta["top_k"]))


def _text(work: Workspace, path: str) -> Windows:
    settings, longest = work.config.evaluate, work.context() or WINDOW
    context = settings.context or min(WINDOW, longest)
    stride = settings.stride or context
    if stride > context:
        raise ConfigError(f"evaluate.stride={stride}: {work.model.name} takes windows of at most {context} tokens")
    return Windows(read(path, work.teacher.tokenizer(), settings.tokens), context, stride)


def _measure(
    work: Workspace, ground: Ground, models: Models, known: dict[str, Metrics] | None = None
) -> dict[str, Found]:
    """Measures one model after the other, each recorded at once, and writes `samples.md`."""
    machine, speech = work.machine, Speech(work)
    found: dict[str, Found] = {}
    comparison: Comparison | None = None
    with work.timed("evaluate"), peaks.phase(EVALUATION):
        teacher = work.teacher.load(machine.dtype, machine.device)
        if ground.rows is not None:
            work.settle(work.teacher, ground.rows, teacher)
            if work.teacher is not work.model and any(models.values()):
                work.settle(work.model, ground.rows)
        speech.hear(TEACHER, teacher)
        teachers_own = ground.free.hear(TEACHER, teacher) if ground.free else {}
        for name, folder in models.items():
            student, quant = _load(work, folder) if folder else (teacher, None)
            found[name] = Found(quant=quant)
            if known and name in known:
                found[name].metrics = known[name]
            elif comparison is not None and folder is None:
                found[name].take(comparison.of_teacher())
            elif ground.rows is not None:
                comparison = compare(student, teacher, ground.rows, ground.top_k, machine)
                found[name].take(comparison)
            if ground.harness is not None:
                found[name].scores = ground.harness.run(student, work.teacher.tokenizer(), machine)
            if ground.free is not None:
                found[name].answers = ground.free.hear(name, student, work.model) if folder else teachers_own
            if folder:
                speech.hear(name, student)
            _record(work.run, found)
            del student  # before the next one is loaded
            system.tidy()
        if (comparison is not None or teachers_own) and TEACHER not in found:
            found[TEACHER] = Found(answers=teachers_own)
            if comparison is not None:
                found[TEACHER].take(comparison.of_teacher())
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
        self._said[name] = answered(model, self._tokenizer, prompts, ends, tokens, machine)

    def write(self) -> None:
        """Writes `samples.md` and notes where it is."""
        if self._tokenizer is None:
            log.warning("no samples: %s has no tokenizer", self._work.teacher.name)
            return
        path = self._work.run.folder / SAMPLES
        title = TITLES[takes_questions(self._tokenizer)]
        write_text(path, samples(title, list(self._prompts), self._said))
        self._work.run.result["paths"]["samples"] = str(path)


def _load(work: Workspace, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    student, manifest = checkpoints.load(folder, work.model, work.machine)
    layers, adapters = checkpoints.layers_of(manifest), adapter.size(student)
    sizes = summary(layers, work.model.skeleton(), adapters=adapters)
    return student, {"preset": manifest["quant"]["name"], **sizes}


def _record(run: Run, found: dict[str, Found]) -> None:
    run.result["evaluation"] = {"interval": METHOD, "models": {name: asdict(one) for name, one in found.items()}}
    run.save()


def samples(title: str, prompts: list[str], said: dict[str, list[str]]) -> str:
    """What each model says to the same prompts, as Markdown."""
    parts = [f"# {title} (most likely tokens, no sampling)\n"]
    for number, prompt in enumerate(prompts):
        parts.append(f"## {prompt}\n")
        for name, texts in said.items():
            quoted = "\n".join(f"> {line}" for line in texts[number].splitlines() or ["(nothing)"])
            parts.append(f"**{name}**\n\n{quoted}\n")
    return "\n".join(parts)
