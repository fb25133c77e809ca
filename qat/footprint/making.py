"""Conversion and its figures."""

from collections import defaultdict
from collections.abc import Iterator

from qat.config import Config
from qat.conversion.convert import STACK_BYTES, stacks, workspace
from qat.conversion.moments import STATES
from qat.conversion.vocabulary import COPIES as CUT_BY
from qat.evaluate.figures import TOGETHER
from qat.flow import KEPT_BYTES
from qat.footprint import libraries
from qat.footprint.activations import passing
from qat.footprint.finished import COMPARED_COPIES, indices, measured_together, student, written_out
from qat.footprint.preparation import compared, reading
from qat.footprint.shapes import FP32, MODEL, TEACHER, Job, Part, Shapes, kind
from qat.machine import Machine
from qat.models.folder import FEW
from qat.peaks import CONVERSION, FIGURES
from qat.quant import kmeans
from qat.quant.architectures import NUMBER, Layer
from qat.quant.vocabulary import ROLES as VOCABULARY

COPIES, SQUARES = 8, 3  # fp32 copies of a weight and of a moment that its fit has at one time, counted (log/memory.md)


def conversion(job: Job, config: Config, shapes: Shapes, machine: Machine) -> Iterator[tuple[str, list[Part]]]:
    """A student is fitted decoder layer by decoder layer, then embedding and head, and then measured."""
    dtype, inner = machine.dtype.itemsize, [layer for layer in job.layers if layer.role not in VOCABULARY]
    streams = shapes.streams and not config.checkpoint.path
    held = [libraries.part(machine)]
    held += reading(shapes, dtype, 1) if streams else [Part("the model's weights", shapes.weights * dtype, MODEL)]
    if config.checkpoint.path:
        held.append(Part("the student's weights", shapes.weights * dtype, "checkpoint"))
    exact, before = list(_exact(inner, shapes, machine)), []
    if config.convert.passes > 1 and not streams:  # whose hidden states the last pass looks at
        before.append(Part("the student of the pass before", student(job, shapes, machine), "convert.passes"))
    gradients = config.convert.gradients or bool(config.quant.candidates)
    yield CONVERSION, [*held, *before, *exact, *_fitting(inner, gradients, job, config, shapes, machine)]
    for outer in [layer for layer in job.layers if layer.role in VOCABULARY]:
        yield f"{CONVERSION} of {outer.role}", [*held, *before, *exact[:1], *_outer(outer, job, machine)]
    yield FIGURES, [*held, *exact, *_figures(job, streams, config, shapes, machine)]


def _fitting(
    inner: list[Layer], gradients: bool, job: Job, config: Config, shapes: Shapes, machine: Machine
) -> Iterator[Part]:
    dtype, tokens = machine.dtype.itemsize, config.convert.calibration_tokens
    states = tokens * shapes.hidden * dtype * (shapes.depth + 1 if gradients else 1)
    yield Part("hidden states", min(states, KEPT_BYTES), "convert.calibration_tokens", least=False)
    at_once = min(tokens, max(config.cache.length, STATES[kind(machine)] // max(1, shapes.hidden)))
    yield Part(
        "what passes through a layer", at_once * passing(shapes, dtype), "convert.calibration_tokens", least=False
    )
    together = decoders_together(inner, STACK_BYTES[kind(machine)])
    moments = largest_moments(inner, gradients)
    key = "convert.gradients" if gradients else MODEL
    yield Part("second moments", FP32 * moments, key, host=True)
    yield Part("those of layers that are fitted together", FP32 * moments * (together - 1), key, host=True, least=False)
    if machine.device.type == "cuda":
        yield Part("moments as they are gathered", FP32 * moments, key, least=False)
    yield from _fit(inner, gradients, job, machine)


def _exact(inner: list[Layer], shapes: Shapes, machine: Machine) -> Iterator[Part]:
    """Weights in fp32 that layers are fitted to, where the model computes in another type or elsewhere."""
    if machine.dtype.itemsize == FP32 and machine.device.type != "cuda":
        return
    whole = FP32 * shapes.weights
    if FP32 * (shapes.weights - shapes.outside) <= FEW:
        yield Part("the model in fp32", whole, MODEL, host=True)
        return
    together = decoders_together(inner, STACK_BYTES[kind(machine)])
    yield Part("a decoder layer in fp32", FP32 * shapes.layer, MODEL, host=True)
    yield Part("layers that are fitted together", FP32 * shapes.layer * (together - 1), MODEL, host=True, least=False)


def _figures(job: Job, streams: bool, config: Config, shapes: Shapes, machine: Machine) -> Iterator[Part]:
    dtype = machine.dtype.itemsize
    if streams:
        yield Part("another decoder layer", shapes.layer * dtype, MODEL)
    else:
        yield Part("the student", student(job, shapes, machine), MODEL)
    if (theirs := shapes.teacher) is not None:
        yield from (
            reading(theirs, dtype, 1, TEACHER)
            if theirs.streams
            else [Part("the teacher's weights", theirs.weights * dtype, TEACHER)]
        )
    if streams:
        outer = sum(layer.weights for layer in job.layers if layer.role in VOCABULARY)
        yield Part("the student's embedding and head", outer * dtype, f"{job.prefix}quant.embed")
    at_once = measured_together(config.cache.length, machine)
    states = 4 * (TOGETHER if streams else at_once) * shapes.hidden * dtype
    yield Part("hidden states", min(2 * KEPT_BYTES, states), MODEL, least=False)
    yield Part("what passes through a layer", at_once * passing(shapes, dtype), "instance.micro_batch", least=False)
    yield written_out(max((layer.weights for layer in job.layers), default=0), machine)
    yield compared(shapes, machine, COMPARED_COPIES)


def largest_moments(layers: list[Layer], gradients: bool) -> int:
    """Numbers in the second moments of one decoder layer, those of each of its experts among them; of the largest."""
    inputs: dict[str, dict[str, int]] = defaultdict(dict)  # width of each input, by decoder layer
    outputs: dict[str, int] = defaultdict(int)
    for layer in layers:
        depth = _decoder(layer)
        inputs[depth][layer.source] = layer.shape[1]
        outputs[depth] += layer.shape[0] ** 2 if gradients else 0
    return max((sum(w**2 for w in inputs[one].values()) + outputs[one] for one in inputs), default=0)


def decoders_together(layers: list[Layer], max_bytes: float) -> int:
    """Decoder layers that are fitted together, as `qat.conversion.convert.groups` takes them."""
    used: dict[object, float] = defaultdict(float)
    seen: set[str] = set()
    for layer in layers:
        if (depth := _decoder(layer)) not in seen and max(used.values(), default=0.0) >= max_bytes:
            break
        seen.add(depth)
        used[layer.shape, layer.format] += workspace(layer)
    return max(1, len(seen))


def _decoder(layer: Layer) -> str:
    found = NUMBER.search(layer.name)
    return layer.name[: found.end()] if found else ""


def _fit(layers: list[Layer], gradients: bool, job: Job, machine: Machine) -> Iterator[Part]:
    """The work space of the stack of layers that takes most."""
    max_bytes = STACK_BYTES[kind(machine)]
    count = decoders_together(layers, max_bytes)
    firsts = list(dict.fromkeys(map(_decoder, layers)))[:count]
    queue = stacks([layer for layer in layers if _decoder(layer) in firsts], max_bytes)
    largest = max(queue, key=equations, default=[])
    if largest:
        told = largest[0].format.equations(*largest[0].shape)
        yield Part(told.what, equations(largest), f"{job.prefix}quant.{largest[0].role}.{told.setting}")
    work = max((sum(_work(layer, gradients) for layer in stack) for stack in queue), default=0.0)
    first = max((_clustering(stack, machine) for stack in queue), default=0.0)
    rest = max(work, first) - (equations(largest) if largest else 0)
    yield Part("the rest of a fit", max(0.0, rest), MODEL, least=False)


def _outer(layer: Layer, job: Job, machine: Machine) -> Iterator[Part]:
    """Embedding or head, of which as many rows are fitted at a time as there is room for."""
    yield Part(f"the {layer.role} matrix in fp32", FP32 * layer.weights, f"{job.prefix}quant.{layer.role}")
    room = STACK_BYTES[kind(machine)] * COPIES / CUT_BY
    fit = max(min(room, _work(layer, False)), _clustering([layer], machine))
    yield Part("its indices and the fit", 3 * indices(layer) + fit, f"{job.prefix}quant.{layer.role}", least=False)


def _work(layer: Layer, gradients: bool) -> float:
    """Bytes that the fit of a layer takes beside its weight and moments, as measured (docs/log/memory.md)."""
    outputs, inputs = layer.shape
    return FP32 * (COPIES * outputs * inputs + SQUARES * (inputs**2 + (outputs**2 if gradients else 0)))


def _clustering(stack: list[Layer], machine: Machine) -> float:
    """Bytes that the first codebooks of a stack of layers take, which are those of a fixed number of bins."""
    parts = stack[0].format.parts(*stack[0].shape).values()
    entries = [part.shape[0] for part in parts if part.kind == "codebooks" and len(part.shape) == 1]
    sizes = len(stack), stack[0].weights
    return max((kmeans.bytes_needed(*sizes, count, kind(machine)) for count in entries), default=0.0)


def equations(stack: list[Layer]) -> float:
    """Bytes of the linear systems of a stack of layers."""
    return float(FP32 * sum(layer.format.equations(*layer.shape).numbers for layer in stack))
