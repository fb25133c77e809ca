"""The minimum memory of a run, computed from shapes before anything is loaded.

Only what must be there at one time is counted, each thing once and at its smallest: a run that is refused
could not have ended, one that is let through may still run out (a GPU's memory is used up to the last byte
by smaller micro-batches first, `qat.distill.step`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from qat import capacity
from qat.cache.format import FORMAT_VERSION, bytes_a_row
from qat.config import (
    Config,
    DataConfig,
    DataSource,
    ModeConfig,
    Stage,
    Start,
    TrainConfig,
)
from qat.console import size
from qat.convert.convert import STACK_BYTES, stacks
from qat.data import mix
from qat.errors import ConfigError
from qat.generation.memory import elements, number
from qat.machine import Machine
from qat.quant.architectures import Layer, learns
from qat.quant.vocabulary import ROLES as VOCABULARY

FP32 = 4
REFERENCE = 8  # bytes of a list's reference to an object
MODEL = "model"  # configuration key to name for memory that only a smaller model reduces
PROMPTS = 400  # lower bound of prompts in the project's own list


@dataclass(frozen=True)
class Part:
    """What some memory is for, and the key that decides it; `host` where a GPU does not hold it."""

    what: str
    bytes: float
    key: str
    host: bool = False


@dataclass(frozen=True)
class Job:
    """A quantized student to be made: its layers, and how they are to learn; `prefix` of its keys."""

    layers: list[Layer]
    mode: ModeConfig
    train: TrainConfig
    prefix: str = ""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a teacher.

    Attributes:
        weights: how many there are.
        exact: on the disk they are fp32, and so read from there as they are needed.
        vocabulary, hidden, inner, depth: tokens, dimensions of hidden states and inside MLPs, decoder layers.
        remembered: numbers that are kept of a token while text is written.
    """

    weights: int
    exact: bool
    vocabulary: int
    hidden: int
    inner: int
    depth: int
    remembered: int

    @classmethod
    def of(cls, model: nn.Module, config: PreTrainedConfig) -> "Shapes":
        """Those of a model, which needs no memory behind it; what its configuration does not tell counts as none."""
        text: Any = config.get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        vocabulary, hidden, inner, depth = (number(text, name) for name in names)
        remembered = elements(text) if number(text, "num_attention_heads") else 0
        weights = sum(parameter.numel() for parameter in model.parameters())
        stored = getattr(config, "dtype", None)
        return cls(weights, stored is torch.float32, vocabulary, hidden, inner, depth, remembered)


def check(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> None:
    """Refuses a run that needs more memory than this machine has.

    Args:
        config: of the run.
        shapes: of its teacher.
        jobs: the students that it makes or trains.
        machine: that it is to run on.

    Raises:
        ConfigError: what takes most of the memory, and which key to change.
    """
    gpu = capacity.device(machine.device)
    host = capacity.host()[0] + psutil.swap_memory().free
    for name, parts in phases(config, shapes, jobs, machine):
        for free, held in (
            (gpu, [part for part in parts if not part.host]),
            (host, [part for part in parts if part.host or gpu is None]),
        ):
            if free is not None and sum(part.bytes for part in held) > free:
                raise ConfigError(_refusal(name, held, free, "" if free == host else " on the GPU"))


def phases(config: Config, shapes: Shapes, jobs: list[Job], machine: Machine) -> Iterator[tuple[str, list[Part]]]:
    """The phases of a run in order, each with the memory that it holds."""
    stage, dtype = config.stage, machine.dtype.itemsize
    teacher = Part("the teacher's weights", shapes.weights * dtype, MODEL)
    in_memory = 0 if shapes.exact else shapes.weights
    exact = Part("the teacher's weights in fp32", in_memory * FP32, MODEL, host=True)
    if stage in (Stage.run, Stage.cache, Stage.convert, Stage.distill) and not config.cache.path:
        for where, source in _generated(config.data):
            yield "text", [teacher, *_writing(source, where, shapes, machine)]
        yield "the cache", [teacher]
    if stage in (Stage.run, Stage.convert):
        for job in jobs:
            yield "conversion", [exact, teacher, *_fit(job, config, machine)]
    if stage in (Stage.run, Stage.distill):
        for job in jobs:
            yield "training", _training(job, config, shapes, machine)
    if stage in (Stage.run, Stage.evaluate):
        yield "evaluation", [teacher, Part("the student's weights", shapes.weights * dtype, MODEL)]
    if stage is Stage.export:
        yield "export", [exact]


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


def _fit(job: Job, config: Config, machine: Machine) -> Iterator[Part]:
    inputs = {layer.source: layer.shape[1] for layer in job.layers}
    moments = FP32 * sum(width**2 for width in inputs.values())
    outer = [layer for layer in job.layers if layer.role in VOCABULARY]
    inner = [layer for layer in job.layers if layer not in outer]
    if config.convert.gradients:
        moments += FP32 * sum(layer.shape[0] ** 2 for layer in inner)
    yield Part("second moments", moments, "convert.gradients" if config.convert.gradients else MODEL, host=True)
    device = "cuda" if machine.device.type == "cuda" else "cpu"
    largest = max(stacks(inner, STACK_BYTES[device]), key=_equations, default=[])
    if largest:
        told = largest[0].format.equations(*largest[0].shape)
        yield Part(told.what, _equations(largest), f"{job.prefix}quant.{largest[0].role}.{told.setting}")
    if outer:
        most = max(outer, key=lambda layer: layer.weights)
        yield Part(f"the {most.role} matrix in fp32", FP32 * most.weights, f"{job.prefix}quant.{most.role}")


def _equations(stack: list[Layer]) -> float:
    """Bytes of the linear systems of a stack of layers."""
    return float(FP32 * sum(layer.format.equations(*layer.shape).numbers for layer in stack))


def _scales(layer: Layer) -> int:
    """Numbers in the parts of a layer that learn as scales."""
    return sum(math.prod(part.shape) for part in layer.format.parts(*layer.shape).values() if part.kind == "scales")


def _training(job: Job, config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    train, dtype, prefix = job.train, machine.dtype.itemsize, job.prefix
    learning = [layer for layer in job.layers if learns(job.mode, layer.role, layer.format)]
    weights, gpu = sum(layer.weights for layer in learning), machine.device.type == "cuda"
    here = 1 if gpu else -(-train.batch_size // max(1, config.instance.devices))  # a GPU may take one at a time
    added_up = any(layer.role in VOCABULARY for layer in learning)
    tokens = min(machine.micro_batch, here) * config.cache.length
    kept = shapes.hidden if gpu else 4 * shapes.hidden + 3 * shapes.inner  # a GPU recomputes the rest
    scales = sum(_scales(layer) for layer in learning)
    meta = {"length": config.cache.length, "top_k": config.cache.top_k, "random": 0, "vocab_size": shapes.vocabulary}
    row = bytes_a_row(meta | {"format": FORMAT_VERSION, "train_targets": config.cache.train_targets}, "train")
    parts = [
        Part("the student's weights", shapes.weights * dtype, MODEL),
        Part("gradients of the weights", weights * (FP32 if added_up else dtype), f"{prefix}mode"),
        Part("scales with their gradients and moments", 4 * FP32 * scales, f"{prefix}quant"),
        Part("activations", tokens * shapes.depth * kept * dtype, "instance.micro_batch"),
        Part("the sequences of a batch", train.batch_size * row, f"{prefix}train.batch_size", host=True),
    ]
    if train.learn.latent > 0:
        parts.append(Part("latent weights with their moments", 3 * FP32 * weights, f"{prefix}train.learn.latent"))
    if config.loss.kind.needs_teacher:
        parts.append(Part("the teacher's weights", shapes.weights * dtype, "loss"))
    return parts


def _refusal(phase: str, parts: list[Part], free: float, where: str) -> str:
    largest = sorted(parts, key=lambda part: -part.bytes)[:2]
    told = " and ".join(f"{size(part.bytes)} for {part.what} ({part.key})" for part in largest)
    keys = [part.key for part in largest if part.key != MODEL]
    change = f"change {keys[0]}" if keys else "choose a smaller model"
    return (
        f"{phase} needs at least {size(sum(part.bytes for part in parts))} of memory{where} and {size(free)} are free:"
        f" {told}; {change}, or use a machine with more"
    )
