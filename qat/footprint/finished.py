"""Students that are there: measured, spoken with, exported."""

import math
from collections.abc import Iterator

from qat.config import Config, ExportType, Stage
from qat.config.evaluate import WINDOW, EvaluateConfig
from qat.evaluate import local
from qat.evaluate.figures import rows_at_once
from qat.footprint import libraries
from qat.footprint.activations import passing
from qat.footprint.preparation import LONGEST, compared, rows_of_text, widened
from qat.footprint.shapes import FP32, MODEL, Job, Part, Shapes, kind
from qat.generation import Sampling, bytes_a_row
from qat.generation import rows_at_once as rows_written
from qat.generation.rows import LOGITS
from qat.machine import Machine
from qat.quant.architectures import Layer
from qat.quant.linear import TOGETHER

COMPARED_COPIES = 7  # of logits while a student is compared with its teacher: two of both, five of their divergence
LOOKED_UP = {"cpu": 2 * FP32, "cuda": 4 * FP32}  # bytes of a weight as it is computed: on a GPU indices have 64 bits
TASK = 256  # tokens taken for a question of somebody's task, which nobody knows before it is tokenized
INDEX = 1  # byte of an index in memory, where nobody has looked at the checkpoint yet


def evaluation(jobs: list[Job], config: Config, shapes: Shapes, machine: Machine) -> Iterator[list[Part]]:
    """Teacher and student side by side: compared on rows of text, asked the questions of tasks, answering prompts."""
    theirs, key = shapes.taught_by
    dtype, settings = machine.dtype.itemsize, config.evaluate
    held = [
        libraries.part(machine, late=config.stage is Stage.run),
        Part("the teacher's weights", theirs.weights * dtype, key),
        *_students(jobs, shapes, machine),
    ]
    larger = max((shapes, theirs), key=lambda one: one.inner)
    if measures_rows(config):
        yield [*held, *_rows(config, larger, shapes, machine)]
    if settings.tasks:  # whose harness takes logits and their logarithms at all positions
        logits = 2 * dtype * _asked(settings, machine) * shapes.vocabulary
        yield [*held, Part("logits of a task's questions", logits, "instance.micro_batch", least=False)]
    if settings.answers:
        yield [*held, *_answers(config, larger, machine)]


def _asked(settings: EvaluateConfig, machine: Machine) -> int:
    """Tokens of the questions of tasks that are read at once; those of the package's own tasks are short and few."""
    ours = local.choices(settings.tasks, settings.examples)
    if ours is None:
        return machine.micro_batch * TASK
    return min(machine.micro_batch, ours) * LONGEST * (1 + (settings.fewshot or 0))


def measures_rows(config: Config) -> bool:
    """Whether an evaluation compares models on rows of text."""
    return bool(config.evaluate.text) or not config.evaluate.apart


def _rows(config: Config, larger: Shapes, shapes: Shapes, machine: Machine) -> Iterator[Part]:
    dtype, tokens = machine.dtype.itemsize, measured_together(_length(config, shapes), machine)
    yield Part("hidden states", 2 * tokens * larger.hidden * dtype, "instance.micro_batch", least=False)
    yield Part("what passes through a layer", tokens * passing(larger, dtype), "instance.micro_batch", least=False)
    yield compared(shapes, machine, COMPARED_COPIES)


def _answers(config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    """What is written at once, or what the comparison of the loop that writes takes before."""
    settings = config.evaluate
    sampling = Sampling(settings.answer_tokens, settings.answer_tokens, 1.0, ())
    rows = min(settings.answers or 0, rows_written(shapes.config, machine, LONGEST, sampling))
    row_bytes = bytes_a_row(shapes.config, LONGEST, sampling, machine.dtype, LOGITS[machine.device.type])
    written = list(rows_of_text(rows, row_bytes, "evaluate.answer_tokens", "evaluate.answers", machine))
    tried = widened(shapes.weights, LONGEST + settings.answer_tokens, shapes, machine)
    return max(written, tried, key=lambda parts: sum(part.bytes for part in parts))


def chat(jobs: list[Job], config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    """A student, its teacher, or both."""
    theirs, key = shapes.taught_by
    dtype, student = machine.dtype.itemsize, bool(config.checkpoint.path)
    parts = [libraries.part(machine), *(_students(jobs, shapes, machine) if student else ())]
    if config.chat.teacher or not student:
        parts.append(Part("the teacher's weights", theirs.weights * dtype, key))
    held = max(shapes.remembered, theirs.remembered) * (LONGEST + config.chat.max_tokens) * dtype
    return [*parts, Part("keys and values", held, "chat.max_tokens", least=False)]


def export(jobs: list[Job], config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    """A model in fp32, and what was written of it, read back beside it; all of it in host memory."""
    whole = config.export.dtype is ExportType.fp32
    written, key = (FP32, "export.dtype") if whole else (FP32 / 2, MODEL)
    return [
        libraries.part(machine, host=True),
        Part("the model's weights in fp32", FP32 * shapes.weights, MODEL, host=True),
        Part("indices and scales", _packed(jobs, shapes), MODEL, host=True, least=False),
        Part("what was written", written * shapes.weights, key, host=True, least=False),
    ]


def _students(jobs: list[Job], shapes: Shapes, machine: Machine) -> Iterator[Part]:
    """A student whose weights are written out."""
    largest = shapes.vocabulary * shapes.hidden
    if jobs:
        largest = max((layer.weights for layer in jobs[-1].layers), default=0)
    yield Part("the student's weights", shapes.weights * machine.dtype.itemsize, MODEL)
    yield Part("the student's indices and scales", _packed(jobs, shapes), "quant", least=False)
    yield written_out(largest, machine)


def student(job: Job, shapes: Shapes, machine: Machine) -> float:
    """Bytes of a student that is measured: its weights written out, and what they are made of."""
    return shapes.weights * machine.dtype.itemsize + _packed([job], shapes)


def written_out(weights: int, machine: Machine) -> Part:
    """A matrix of so many weights as it is computed, or as much of it as is at a time."""
    work = min(TOGETHER, weights) * LOOKED_UP[kind(machine)]
    return Part("a matrix that is written out", work, MODEL, least=False)


def measured_together(length: int, machine: Machine) -> int:
    """Tokens that two models are compared on together."""
    return rows_at_once(length, machine) * length


def indices(layer: Layer) -> int:
    """Bytes of a layer's indices in memory."""
    return math.prod(layer.format.indices(*layer.shape).shape)


def _packed(jobs: list[Job], shapes: Shapes) -> float:
    """Bytes of what the weights of the last of some students are made of; of one that nobody knows, an index each."""
    if not jobs:
        return INDEX * shapes.weights
    numbers = [part.shape for layer in jobs[-1].layers for part in layer.format.parts(*layer.shape).values()]
    return sum(map(indices, jobs[-1].layers)) + FP32 * sum(map(math.prod, numbers))


def _length(config: Config, shapes: Shapes) -> int:
    """Tokens of a row that is measured on."""
    if not config.evaluate.text:
        return config.cache.length
    longest = getattr(shapes.config, "max_position_embeddings", None) or WINDOW
    return config.evaluate.context or min(WINDOW, longest)
