"""A step of training: what is held between steps, and what a micro-batch takes besides."""

import math
from collections import defaultdict
from collections.abc import Iterator

from qat import processes
from qat.config import Config, LossKind, Stage
from qat.distill.head import CHUNK_BYTES
from qat.distill.moments import BUFFERS, PIECE
from qat.distill.step import RECORDED_TOKENS
from qat.footprint import libraries
from qat.footprint.activations import backward, kept, passing
from qat.footprint.preparation import row_bytes, widened
from qat.footprint.shapes import FP32, MODEL, Job, Part, Shapes, kind
from qat.machine import MEASURED, Machine
from qat.quant.architectures import Layer, learns
from qat.quant.shards import OPEN, UNDER_WAY
from qat.quant.vocabulary import ROLES as VOCABULARY

# Bytes of a logit while its loss is differentiated, its gradient in the compute type left out: against a teacher's
# logits, and against cached tokens. On a GPU kernels make from them what are further tensors on a CPU
BESIDE_TEACHER = {"cuda": 2 * FP32, "cpu": 6 * FP32}
BY_CACHE = {"cuda": FP32, "cpu": 2 * FP32}
FILLED_UP = 3 * FP32  # while the logits of a teacher of fewer tokens become as many as the student's
STUDENTS, TEACHERS, INDICES = "the student's weights", "the teacher's weights", "indices"
BEFORE = (STUDENTS, TEACHERS, INDICES, libraries.WHAT)  # what is there before the first step
HELD_OUT = "held-out text beside recorded steps"
PRODUCT = 3 * FP32 * MEASURED**2  # two matrices, and what a product of them is computed in
TOLD = 8 + FP32  # bytes of a cached token's number and log-probability as the loss takes them


def comparisons(job: Job, config: Config, shapes: Shapes, machine: Machine) -> Iterator[list[Part]]:
    """What is looked at before the first step, beside a student: the model, where nothing was yet; the student."""
    held = [part for part in _held(job, config, shapes, machine) if part.what in BEFORE]
    loose = [part for part in held if part.what not in (STUDENTS, TEACHERS)]  # nothing is written out yet
    latent = FP32 * sum(layer.weights for layer in _learning(job)) if job.train.learn.latent > 0 else 0
    held.append(Part("latent weights", latent, f"{job.prefix}train.learn.latent"))
    wide = widened(shapes.weights, config.cache.length, shapes, machine)
    if config.stage is Stage.distill or config.cache.path:
        dense = shapes.weights - sum(layer.weights for layer in job.layers)
        rest = Part(STUDENTS, dense * machine.dtype.itemsize, MODEL)
        yield [*loose, rest, Part("the model's weights", shapes.weights * machine.dtype.itemsize, MODEL), *wide]
    if shapes.fuses(machine):
        yield [*held, *wide]


def training(job: Job, config: Config, shapes: Shapes, machine: Machine) -> Iterator[list[Part]]:
    """A step; and the product that a machine's speed is measured by afterwards."""
    held, rows = _held(job, config, shapes, machine), _rows(job, config)
    yield [*held, *_micro_batch(min(machine.micro_batch, rows), config, shapes, machine)]
    yield [*held, Part("a product that is measured", PRODUCT, MODEL, least=False)]


def _rows(job: Job, config: Config) -> int:
    """Rows of a step in one process."""
    return -(-job.train.batch_size // _together(config))


def _together(config: Config) -> int:
    return max(config.instance.devices, processes.place().count)


def _held(job: Job, config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    """What is there from the first step to the last."""
    train, dtype, prefix, gpu = job.train, machine.dtype.itemsize, job.prefix, machine.device.type == "cuda"
    learning = _learning(job)
    weights = sum(layer.weights for layer in learning)
    together, rows = _together(config), _rows(job, config)
    latent = train.learn.latent > 0
    shared = together if latent else 1  # processes that hold states of a share of the layers each (qat.quant.shards)
    added_up = latent or rows > machine.micro_batch or any(layer.role in VOCABULARY for layer in learning)
    scales = sum(_scales(layer) for layer in learning)
    indices = sum(math.prod(layer.format.indices(*layer.shape).shape) for layer in job.layers)
    parts = [
        libraries.part(machine, late=True),
        Part(STUDENTS, shapes.weights * dtype, MODEL),
        Part("gradients of the weights", weights * (FP32 if added_up else dtype) / shared, f"{prefix}mode"),
        Part("scales with their gradients and moments", 4 * FP32 * scales / shared, f"{prefix}quant"),
        Part(INDICES, indices - weights * (1 - 1 / shared), f"{prefix}quant"),
        Part(
            "the sequences of a batch",
            train.batch_size * row_bytes(config, shapes.vocabulary),
            f"{prefix}train.batch_size",
            host=True,
        ),
    ]
    if job.mode.rank:
        numbers = job.mode.rank * sum(sum(layer.shape) for layer in _chosen(job))
        parts.append(Part("adapters with their gradients and moments", 4 * FP32 * numbers, f"{prefix}mode.rank"))
    if latent:
        parts += _latent(weights, shared, f"{prefix}train.learn.latent", machine)
    if shared > 1:
        parts += _sent(learning, dtype, shared, f"{prefix}mode")
    if config.loss.kind.needs_teacher:
        theirs, _ = shapes.taught_by
        parts.append(Part(TEACHERS, theirs.weights * dtype, "loss"))
    if gpu:
        batch = rows * row_bytes(config, shapes.vocabulary)
        parts.append(Part("a batch on the GPU", batch, f"{prefix}train.batch_size", least=False))
    return parts


def _chosen(job: Job) -> list[Layer]:
    """The layers that learn, be it by adapters."""
    return [layer for layer in job.layers if learns(job.mode, layer.role, layer.format)]


def _learning(job: Job) -> list[Layer]:
    """The layers whose own parts learn."""
    return [] if job.mode.rank else _chosen(job)


def _micro_batch(rows: int, config: Config, shapes: Shapes, machine: Machine) -> Iterator[Part]:
    """What so many rows take on the way forth and back."""
    dtype, length, gpu = machine.dtype.itemsize, config.cache.length, machine.device.type == "cuda"
    key, again = "instance.micro_batch", bool(machine.checkpointing)
    tokens = rows * (length - 1)

    def activations(rows: int, again: bool) -> float:
        a_token = kept(shapes, machine, length, config.cache.packing, again)
        inside = kept(shapes, machine, length, config.cache.packing, False) if again else 0.0
        return rows * (length - 1) * (shapes.depth * a_token + inside)

    # A GPU that has no room takes one row at a time and computes the rest again
    least = activations(1, True) if gpu else activations(rows, again)
    yield Part("activations", least, key)
    yield Part("further activations", max(0.0, activations(rows, again) - least), key, least=False)
    if not gpu:  # whose allocator gives up such pieces where memory is short
        yield Part("pieces between tensors", libraries.PIECES * activations(rows, again), key, least=False)
    logits, measured = _logits(tokens, config, shapes, machine)
    slopes = tokens * backward(shapes, dtype)
    if logits >= slopes:
        yield Part("logits", logits, "loss", least=False)
    else:
        yield Part("gradients inside a layer", slopes, key, least=False)
    if gpu and rows * length <= RECORDED_TOKENS:  # a recording keeps its memory while others measure
        beside = measured + tokens * passing(shapes, dtype)
        yield Part(HELD_OUT, beside, key, least=False)
    states = 2 * tokens * shapes.hidden * dtype
    if config.loss.kind.needs_teacher and (theirs := shapes.taught_by[0]):
        yield Part("the teacher's hidden states", tokens * theirs.hidden * dtype, key, least=False)
    else:
        states += tokens * config.cache.top_k * TOLD
    yield Part("hidden states", states, key, least=False)


def _logits(tokens: int, config: Config, shapes: Shapes, machine: Machine) -> tuple[float, float]:
    """Bytes of the logits that exist at one time in training, and while held-out text is measured."""
    if config.loss.kind is LossKind.topk_kl:
        return 0.0, 0.0
    dtype, beside = machine.dtype.itemsize, config.loss.kind.needs_teacher
    at_once = min(tokens, CHUNK_BYTES[machine.device.type] // (FP32 * shapes.vocabulary)) * shapes.vocabulary
    a_logit = (BESIDE_TEACHER if beside else BY_CACHE)[kind(machine)]
    if kind(machine) == "cuda" or dtype < FP32:
        a_logit += dtype
    if beside and shapes.taught_by[0].vocabulary < shapes.vocabulary:
        a_logit = max(a_logit, FILLED_UP)
    return at_once * a_logit, at_once * FP32 * (2 if beside else 1)


def _latent(weights: int, shared: int, key: str, machine: Machine) -> Iterator[Part]:
    own, host = FP32 * weights / shared, machine.host_moments
    yield Part("latent weights" if host else "latent weights with their moments", (3 - 2 * host) * own, key)
    if host:
        yield Part("moments of latent weights", 2 * shared * own, key, host=True)
    if host and machine.device.type == "cuda":
        yield Part("moments on their way", FP32 * BUFFERS * 2 * PIECE, key)
    yield Part("a state on its way to a file", 3 * shared * own, key, host=True, least=False)


def _scales(layer: Layer) -> int:
    """Numbers in the parts of a layer that learn as scales."""
    return sum(math.prod(part.shape) for part in layer.format.parts(*layer.shape).values() if part.kind == "scales")


def _sent(learning: list[Layer], dtype: int, shared: int, key: str) -> Iterator[Part]:
    """What a process that holds states of a share of the layers has of others' gradients."""
    several = [layer.weights for layer in learning if layer.role in VOCABULARY]
    if several:
        yield Part("gradients of embedding and head", FP32 * sum(several) * (1 - 1 / shared), key)
    sizes: dict[str, int] = defaultdict(int)
    for layer in learning:
        sizes[layer.name.rpartition(".")[0]] += 0 if layer.role in VOCABULARY else layer.weights
    buckets = 2 * UNDER_WAY + OPEN  # sent, as much again found, and what is computed meanwhile
    at_once = max(sizes.values(), default=0) * (shared - 1) * buckets
    yield Part("gradients on their way", at_once * dtype, key, least=False)
