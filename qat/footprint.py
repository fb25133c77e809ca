"""The memory of a run, computed from shapes before anything is loaded.

A phase has parts. Some must be there at one time whatever is done, each counted once and at its smallest: a run of
which these alone have no room could not have ended, and is refused. With the others, which depend on how work is cut
into pieces, they are what the run is expected to take: that is shown before it starts, and a run of which that has no
room may still end (a GPU's memory is used up to the last byte by smaller micro-batches first, `qat.distill.step`).
Either way the sentence names the cheapest key that makes it fit.
"""

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
from torch import nn
from transformers import PreTrainedConfig

from qat import capacity, processes
from qat.cache.format import FORMAT_VERSION, bytes_a_row
from qat.config import (
    Config,
    DataConfig,
    DataSource,
    LossKind,
    ModeConfig,
    Stage,
    Start,
    TrainConfig,
)
from qat.console import size
from qat.conversion.convert import STACK_BYTES, stacks
from qat.data import mix
from qat.distill.head import CHUNK_BYTES, positions_at_once
from qat.errors import ConfigError
from qat.evaluate.figures import TOGETHER
from qat.flow import KEPT_BYTES
from qat.generation.memory import elements, number
from qat.machine import Machine
from qat.quant.architectures import NUMBER, Layer, learns
from qat.quant.shards import OPEN, UNDER_WAY
from qat.quant.vocabulary import ROLES as VOCABULARY

log = logging.getLogger(__name__)

FP32 = 4
POSITIONS = 2048  # positions whose logits a GPU holds together for a cache; a CPU an eighth of them
# Numbers that a decoder layer's own code in transformers keeps of a token beside what its formulas need, in hidden
# states and in what is inside its MLP; and logits that exist at one time in training, in chunks
FURTHER_HIDDEN, FURTHER_INNER, LOGIT_COPIES = 8, 1, 3
COMPARED_COPIES = 6  # of logits while a student is compared with its teacher
COPIES, SQUARES = 5, 4  # copies of a weight and of a moment that its fit has at one time
REFERENCE = 8  # bytes of a list's reference to an object
MODEL, TEACHER = "model", "teacher"  # configuration keys to name for memory that only a smaller model reduces
PROMPTS = 400  # lower bound of prompts in the project's own list


@dataclass(frozen=True)
class Part:
    """What some memory is for, and the key that decides it.

    Attributes:
        host: a GPU does not hold it.
        least: it must be there whatever is done; else it is expected.
    """

    what: str
    bytes: float
    key: str
    host: bool = False
    least: bool = True


@dataclass(frozen=True)
class Job:
    """A quantized student to be made: its layers, and how they are to learn; `prefix` of its keys."""

    layers: list[Layer]
    mode: ModeConfig
    train: TrainConfig
    prefix: str = ""


Jobs = Callable[[Config], list[Job]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model.

    Attributes:
        weights: how many there are.
        outside, layer: of them, those outside of decoder layers, and those of the largest decoder layer.
        streams: decoder layers can be read one at a time.
        vocabulary, hidden, inner, depth: tokens, dimensions of hidden states and inside MLPs, decoder layers.
        remembered: numbers that are kept of a token while text is written.
        teacher: sizes of its teacher, where that is another model.
    """

    weights: int
    outside: int
    layer: int
    streams: bool
    vocabulary: int
    hidden: int
    inner: int
    depth: int
    remembered: int
    teacher: "Shapes | None" = None

    @property
    def taught_by(self) -> tuple["Shapes", str]:
        """Sizes of its teacher, which may be itself, and the key that decides them."""
        return (self, MODEL) if self.teacher is None else (self.teacher, TEACHER)

    @classmethod
    def of(cls, model: nn.Module, config: PreTrainedConfig, streams: bool = True) -> "Shapes":
        """Those of a model, which needs no memory behind it; what its configuration does not tell counts as none."""
        text: Any = config.get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        vocabulary, hidden, inner, depth = (number(text, name) for name in names)
        remembered = elements(text) if number(text, "num_attention_heads") else 0
        inside: dict[str, int] = defaultdict(int)  # weights by decoder layer
        weights = 0
        for name, parameter in model.named_parameters():
            weights += parameter.numel()
            if found := NUMBER.search(name):
                inside[name[: found.end()]] += parameter.numel()
        outside, layer = weights - sum(inside.values()), max(inside.values(), default=0)
        return cls(weights, outside, layer, streams, vocabulary, hidden, inner, depth, remembered)


@dataclass(frozen=True)
class Place:
    """Memory of one kind, with what is free of it; `where` in a sentence."""

    free: float
    where: str
    parts: list[Part]

    def needed(self, least: bool = False) -> float:
        """Bytes of all parts, or of those alone that must be there."""
        return sum(part.bytes for part in self.parts if part.least or not least)


def check(config: Config, shapes: Shapes, jobs: Jobs, machine: Machine) -> None:
    """Refuses a run that needs more memory than this machine has, and warns of one that is expected to take more.

    Args:
        config: of the run.
        shapes: of its models.
        jobs: gives the students that a configuration makes or trains.
        machine: that it is to run on.

    Raises:
        ConfigError: what takes most of the memory, and which key to change.
    """
    for least in (True, False):
        for name, parts in phases(config, shapes, jobs(config), machine):
            for place in places(parts, machine):
                if place.needed(least) > place.free:
                    said = _refusal(name, place, least, remedy(config, shapes, jobs, machine, name, least))
                    if least:
                        raise ConfigError(said)
                    log.warning(said)
                    return


def plan(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> dict[str, Place]:
    """What each phase of a run is expected to take, where most is taken for what is free: a GPU, else the host."""
    found: dict[str, Place] = {}
    for name, parts in phases(config, shapes, jobs, machine):
        tightest = max(places(parts, machine), key=lambda place: place.needed() / max(place.free, 1))
        if name not in found or found[name].needed() < tightest.needed():
            found[name] = tightest
    return found


def told(place: Place) -> str:
    """A phase in a few words: all of it and its largest parts."""
    largest = [part for part in sorted(place.parts, key=lambda part: -part.bytes) if part.bytes > 0.02 * place.needed()]
    parts = ", ".join(f"{part.what} {size(part.bytes)}" for part in largest)
    return f"{size(place.needed())}{place.where} ({parts})"


def summary(places: dict[str, Place]) -> str:
    """All phases in one line, the largest with its parts."""
    most = max(places, key=lambda name: places[name].needed())
    said = [f"{name} {told(place) if name == most else size(place.needed())}" for name, place in places.items()]
    return f"{', '.join(said)}; {size(places[most].free)} free"


def places(parts: list[Part], machine: Machine) -> list[Place]:
    """The kinds of memory with the parts that each holds."""
    gpu, host = capacity.device(machine.device), capacity.host()[0] + psutil.swap_memory().free
    if gpu is None:
        return [Place(host, "", parts)]
    return [
        Place(gpu, " on the GPU", [part for part in parts if not part.host]),
        Place(host, "", [part for part in parts if part.host]),
    ]


def remedy(config: Config, shapes: Shapes, jobs: Jobs, machine: Machine, phase: str, least: bool = False) -> list[str]:
    """The cheapest keys with which a phase fits, as typed; none where all of them together do not help.

    Changes are tried in the order of what they cost: time alone, then precision of the conversion, then of the student.
    """

    def fits(changed: Config, on: Machine) -> bool:
        try:
            made = list(phases(changed, shapes, jobs(changed), on))
        except ConfigError:  # nothing would be left to quantize
            return False
        held = [place for name, parts in made if name == phase for place in places(parts, on)]
        return all(place.needed(least) <= place.free for place in held)

    taken: list[tuple[str, Change]] = []
    for said, change in _cheaper(config, machine):
        taken.append((said, change))
        if fits(*_changed(config, machine, [one for _, one in taken])):
            break
    else:
        return []
    for one in list(taken):  # what came before and is not needed
        rest = [other for other in taken if other is not one]
        if fits(*_changed(config, machine, [change for _, change in rest])):
            taken = rest
    return [said for said, _ in taken]


Change = Callable[[Config], None]


def _changed(config: Config, machine: Machine, changes: list[Change]) -> tuple[Config, Machine]:
    changed = copy.deepcopy(config)
    for change in changes:
        change(changed)
    same = changed.instance.micro_batch == config.instance.micro_batch
    rows = machine.micro_batch if same else changed.instance.micro_batch
    again = True if changed.instance.checkpointing == "true" else machine.checkpointing
    return changed, replace(machine, micro_batch=rows, checkpointing=again)


def _cheaper(config: Config, machine: Machine) -> Iterator[tuple[str, Change]]:
    """Changes that take less memory, as typed, from the cheapest on."""

    def setting(key: str, value: Any) -> Change:
        *path, leaf = key.split(".")

        def change(changed: Any) -> None:
            for part in path:
                changed = getattr(changed, part)
            setattr(changed, leaf, value)

        return change

    rows = config.instance.micro_batch
    while rows > 1:
        rows //= 2
        yield f"instance.micro_batch={rows}", setting("instance.micro_batch", rows)
    if config.instance.checkpointing != "true":
        yield "instance.checkpointing=true", setting("instance.checkpointing", "true")
    if config.instance.moments != "host" and config.train.learn.latent > 0 and machine.device.type == "cuda":
        yield "instance.moments=host", setting("instance.moments", "host")
    if config.convert.gradients:
        yield "convert.gradients=false", setting("convert.gradients", False)
    if config.loss.kind.needs_teacher:
        yield "loss=bucket_kl", setting("loss.kind", LossKind.bucket_kl)
    if config.train.learn.latent > 0:
        yield "train.learn.latent=0", setting("train.learn.latent", 0.0)
    for role in ("embed", "head"):
        if getattr(config.quant, role) is not None:
            yield f"quant.{role}=null", setting(f"quant.{role}", None)
    if config.mode.mlp and config.mode.attn:
        yield "mode.attn=false" if config.mode.rank else "mode=mlp", setting("mode.attn", False)


def phases(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> Iterator[tuple[str, list[Part]]]:
    """The phases of a run in order, each with the memory that it holds."""
    stage, dtype = config.stage, machine.dtype.itemsize
    theirs, key = shapes.taught_by
    teacher = Part("the teacher's weights", theirs.weights * dtype, key)
    if stage in (Stage.run, Stage.cache, Stage.convert, Stage.distill) and not config.cache.path:
        for where, source in _generated(config.data):
            yield "text", [teacher, *_writing(source, where, theirs, machine)]
        streams = theirs.streams and (stage is Stage.convert or not capacity.roomy(teacher.bytes, machine.device))
        held = _reading(theirs, dtype, 1, key) if streams else [teacher]
        positions = POSITIONS if machine.device.type == "cuda" else POSITIONS // 8
        yield "the cache", [*held, _logits(LOGIT_COPIES * positions * theirs.vocabulary)]
    if stage in (Stage.run, Stage.convert):
        for job in jobs:
            yield from _conversion(job, config, shapes, machine)
    if stage in (Stage.run, Stage.distill):
        for job in jobs:
            yield "training", _training(job, config, shapes, machine)
    if stage in (Stage.run, Stage.evaluate):
        student = Part("the student's weights", shapes.weights * dtype, MODEL)
        yield "evaluation", [teacher, student, _compared(shapes, machine)]
    if stage is Stage.export:
        yield "export", [Part("the model's weights in fp32", shapes.weights * FP32, MODEL, host=True)]


def _reading(shapes: Shapes, dtype: int, models: int, key: str = MODEL) -> list[Part]:
    """What is in memory of models whose decoder layers are read one at a time; they share what is outside of these."""
    return [
        Part("embedding, head and norms", shapes.outside * dtype, key),
        Part("a decoder layer", models * shapes.layer * dtype, key),
    ]


def _logits(numbers: int) -> Part:
    return Part("logits", FP32 * numbers, MODEL, least=False)


def _compared(shapes: Shapes, machine: Machine) -> Part:
    """Logits of student and teacher at the positions that are compared together."""
    positions = positions_at_once(_kind(machine), shapes.vocabulary)
    return _logits(COMPARED_COPIES * positions * shapes.vocabulary)


def _conversion(job: Job, config: Config, shapes: Shapes, machine: Machine) -> Iterator[tuple[str, list[Part]]]:
    """A student is fitted decoder layer by decoder layer, then embedding and head, and then measured."""
    dtype, inner = machine.dtype.itemsize, [layer for layer in job.layers if layer.role not in VOCABULARY]
    streams = shapes.streams and not config.checkpoint.path
    held = _reading(shapes, dtype, 1) if streams else [Part("the model's weights", shapes.weights * dtype, MODEL)]
    if config.checkpoint.path:
        held.append(Part("the student's weights", shapes.weights * dtype, "checkpoint"))
    tokens, gradients = config.convert.calibration_tokens, config.convert.gradients
    states = tokens * shapes.hidden * dtype * (shapes.depth + 1 if gradients else 2)
    kept = Part("hidden states", min(states, KEPT_BYTES), "convert.calibration_tokens", least=False)
    fitting = [kept, *_moments(inner, gradients), *_fit(inner, gradients, job, machine)]
    if dtype != FP32 or machine.device.type == "cuda":
        fitting.append(Part("a decoder layer in fp32", shapes.layer * FP32, MODEL, host=True))
    yield "conversion", [*held, *fitting]
    for outer in [layer for layer in job.layers if layer.role in VOCABULARY]:
        matrix = Part(f"the {outer.role} matrix in fp32", FP32 * outer.weights, f"{job.prefix}quant.{outer.role}")
        work = Part("its indices and the fit", 3 * outer.weights + STACK_BYTES[_kind(machine)], MODEL, least=False)
        yield f"conversion of {outer.role}", [*held, matrix, work]
    both = _reading(shapes, dtype, 2) if streams else [*held, Part("the student", shapes.weights * dtype, MODEL)]
    if (theirs := shapes.teacher) is not None:
        whole = [Part("the teacher's weights", theirs.weights * dtype, TEACHER)]
        both += _reading(theirs, dtype, 1, TEACHER) if theirs.streams else whole
    outer_weights = sum(layer.weights for layer in job.layers if layer.role in VOCABULARY)
    both += [
        Part("the student's embedding and head", outer_weights * dtype, f"{job.prefix}quant.embed"),
        Part("hidden states", min(2 * KEPT_BYTES, 4 * TOGETHER * shapes.hidden * dtype), MODEL, least=False),
        _compared(shapes, machine),
    ]
    yield "figures of the conversion", both


def _kind(machine: Machine) -> str:
    return "cuda" if machine.device.type == "cuda" else "cpu"


def _moments(layers: list[Layer], gradients: bool) -> list[Part]:
    """The second moments of one decoder layer, those of each of its experts among them; of the largest."""
    inputs: dict[str, dict[str, int]] = defaultdict(dict)  # width of each input, by decoder layer
    outputs: dict[str, int] = defaultdict(int)
    for layer in layers:
        found = NUMBER.search(layer.name)
        depth = layer.name[: found.end()] if found else ""
        inputs[depth][layer.source] = layer.shape[1]
        outputs[depth] += layer.shape[0] ** 2 if gradients else 0
    largest = max((sum(w**2 for w in inputs[one].values()) + outputs[one] for one in inputs), default=0)
    return [Part("second moments", FP32 * largest, "convert.gradients" if gradients else MODEL, host=True)]


def _generated(data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """The sources that the teacher writes, with the beginning of their keys."""
    for place, part in enumerate(mix.parts(data)):
        if part.source is DataSource.selfgen:
            yield f"data.parts[{place}]." if data.parts else "data.", part


def _writing(source: DataConfig, where: str, shapes: Shapes, machine: Machine) -> Iterator[Part]:
    starts = {
        Start.prompts: PROMPTS if not source.path else 1,
        Start.tokens: shapes.vocabulary,
        Start.openings: 1,
        Start.questions: source.documents or 1,
    }[source.start]
    documents = min(starts, source.documents or starts)
    rows, key = documents * source.answers, "documents" if documents > source.answers else "answers"
    yield Part("the list of all answers", 2 * REFERENCE * rows, where + key, host=True)
    at_once = 1 if machine.device.type == "cuda" else min(rows, 64)
    remembered = at_once * source.answer_tokens * shapes.remembered * machine.dtype.itemsize
    yield Part("keys and values of answers", remembered, f"{where}answer_tokens")


def _fit(layers: list[Layer], gradients: bool, job: Job, machine: Machine) -> Iterator[Part]:
    """The work space of the stack of layers that takes most."""
    queue = stacks(layers, STACK_BYTES[_kind(machine)])
    largest = max(queue, key=_equations, default=[])
    if largest:
        told = largest[0].format.equations(*largest[0].shape)
        yield Part(told.what, _equations(largest), f"{job.prefix}quant.{largest[0].role}.{told.setting}")
    work = max((sum(_work(layer, gradients) for layer in stack) for stack in queue), default=0.0)
    yield Part("the rest of a fit", max(0.0, work - (_equations(largest) if largest else 0)), MODEL, least=False)


def _work(layer: Layer, gradients: bool) -> float:
    """Bytes that the fit of a layer takes beside its weight and moments, as measured (docs/log/memory.md)."""
    outputs, inputs = layer.shape
    return FP32 * (COPIES * outputs * inputs + SQUARES * (inputs**2 + (outputs**2 if gradients else 0)))


def _equations(stack: list[Layer]) -> float:
    """Bytes of the linear systems of a stack of layers."""
    return float(FP32 * sum(layer.format.equations(*layer.shape).numbers for layer in stack))


def _scales(layer: Layer) -> int:
    """Numbers in the parts of a layer that learn as scales."""
    return sum(math.prod(part.shape) for part in layer.format.parts(*layer.shape).values() if part.kind == "scales")


def _training(job: Job, config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    train, dtype, prefix = job.train, machine.dtype.itemsize, job.prefix
    chosen = [layer for layer in job.layers if learns(job.mode, layer.role, layer.format)]
    learning, adapted = ([], chosen) if job.mode.rank else (chosen, [])
    weights, gpu = sum(layer.weights for layer in learning), machine.device.type == "cuda"
    together = max(config.instance.devices, processes.place().count)
    here = 1 if gpu else -(-train.batch_size // together)  # a GPU may take one at a time
    latent = train.learn.latent > 0
    shared = together if latent else 1  # processes that hold states of a share of the layers each (qat.quant.shards)
    added_up = latent or here > machine.micro_batch or any(layer.role in VOCABULARY for layer in learning)
    tokens = min(machine.micro_batch, here) * config.cache.length
    # A GPU, and whoever is told to, can compute the rest again
    again = machine.checkpointing if not gpu else True
    kept = shapes.hidden if again else 4 * shapes.hidden + 3 * shapes.inner
    further = 0 if machine.checkpointing else (FURTHER_HIDDEN * shapes.hidden + FURTHER_INNER * shapes.inner)
    scales = sum(_scales(layer) for layer in learning)
    meta = {"length": config.cache.length, "top_k": config.cache.top_k, "random": 0, "vocab_size": shapes.vocabulary}
    answers = config.loss.kind.needs_answers
    kept_of_teacher = config.cache.train_targets and not answers
    meta |= {"format": FORMAT_VERSION, "train_targets": kept_of_teacher, "answers": answers}
    row = bytes_a_row(meta, "train")
    parts = [
        Part("the student's weights", shapes.weights * dtype, MODEL),
        Part("gradients of the weights", weights * (FP32 if added_up else dtype) / shared, f"{prefix}mode"),
        Part("scales with their gradients and moments", 4 * FP32 * scales / shared, f"{prefix}quant"),
        Part("indices", sum(layer.weights for layer in job.layers) - weights * (1 - 1 / shared), f"{prefix}quant"),
        Part("activations", tokens * shapes.depth * kept * dtype, "instance.micro_batch"),
        Part("further activations", tokens * shapes.depth * further * dtype, "instance.micro_batch", least=False),
        Part("logits", LOGIT_COPIES * CHUNK_BYTES[machine.device.type], "loss", least=False),
        Part("the sequences of a batch", train.batch_size * row, f"{prefix}train.batch_size", host=True),
    ]
    if adapted:
        numbers = job.mode.rank * sum(sum(layer.shape) for layer in adapted)
        parts.append(Part("adapters with their gradients and moments", 4 * FP32 * numbers, f"{prefix}mode.rank"))
    if latent:
        own, key, host = FP32 * weights / shared, f"{prefix}train.learn.latent", config.instance.moments == "host"
        parts.append(Part("latent weights" if host else "latent weights with their moments", (3 - 2 * host) * own, key))
        if host:
            parts.append(Part("moments of latent weights", 2 * shared * own, key, host=True))
    if shared > 1:
        parts += _sent(learning, dtype, shared, f"{prefix}mode")
    if config.loss.kind.needs_teacher:
        parts.append(Part("the teacher's weights", shapes.taught_by[0].weights * dtype, "loss"))
    if config.loss.kind.needs_teacher and (theirs := shapes.teacher) is not None:
        states = tokens * (FURTHER_HIDDEN * theirs.hidden + 3 * theirs.inner) * dtype  # of the layer that is computed
        parts.append(Part("the teacher's activations", states, "instance.micro_batch", least=False))
    return parts


def _sent(learning: list[Layer], dtype: int, shared: int, key: str) -> Iterator[Part]:
    """What a process that holds states of a share of the layers has of others' gradients."""
    several = [layer.weights for layer in learning if layer.role in VOCABULARY]
    if several:
        yield Part("gradients of embedding and head", FP32 * sum(several) * (1 - 1 / shared), key)
    sizes: dict[str, int] = defaultdict(int)
    for layer in learning:
        sizes[layer.name.rpartition(".")[0]] += 0 if layer.role in VOCABULARY else layer.weights
    buckets = 2 * UNDER_WAY + OPEN  # sent, as much again found, and what is computed meanwhile
    at_once = max(sizes.values(), default=0) * shared * buckets
    yield Part("gradients on their way", at_once * dtype, key, least=False)


def _refusal(phase: str, place: Place, least: bool, keys: list[str]) -> str:
    largest = sorted((part for part in place.parts if part.least or not least), key=lambda part: -part.bytes)[:2]
    told = " and ".join(f"{size(part.bytes)} for {part.what} ({part.key})" for part in largest)
    own = [part.key for part in largest if part.key not in (MODEL, TEACHER)]
    smaller = f"change {own[0]}" if own else f"choose a smaller {largest[0].key}"
    change = f"{' '.join(keys)} makes it fit" if keys else smaller
    needs = "needs at least" if least else "is expected to take"
    return (
        f"{phase} {needs} {size(place.needed(least))} of memory{place.where} and {size(place.free)} are free:"
        f" {told}; {change}, or use a machine with more"
    )
