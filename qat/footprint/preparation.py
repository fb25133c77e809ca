"""Text, caches, and the comparison of passes: what a run takes before a student is made."""

from collections.abc import Iterator
from itertools import chain

from qat import capacity
from qat.cache.format import FORMAT_VERSION, SHARD_ROWS, bytes_a_row
from qat.cache.writer import POSITIONS
from qat.config import Config, DataConfig, DataSource, Stage, Start
from qat.data import mix
from qat.data.starts import OPENING
from qat.distill.head import positions_at_once
from qat.fidelity.sample import POSITIONS as COMPARED
from qat.footprint import libraries
from qat.footprint.activations import passing
from qat.footprint.shapes import FP32, MODEL, Part, Shapes, kind
from qat.generation.loop import TOKENS_AT_ONCE, Sampling
from qat.generation.rows import Batches, batches
from qat.machine import Machine

REFERENCE = 8  # bytes of a list's reference to an object
PROMPTS = 400  # lower bound of prompts in the project's own list
LONGEST = 64  # tokens taken for a question in a chat template, whose length nobody knows before it is tokenized
FIRST = 2  # tokens of a start from first tokens
IDS, LOGPROBS = 8, 2  # bytes of a recorded token's number and log-probability before they are packed
RECORDED = 2  # copies of logits while a cache is recorded: those of the piece before go when the next are there
COMPARED_COPIES = 4  # of log-probabilities at the compared positions


def text(config: Config, shapes: Shapes, machine: Machine) -> Iterator[list[Part]]:
    """What the teacher writes, all sources at once; nothing where it writes nothing.

    One source after the other has its turn, while all others have their rows: it reads prompts, then chooses tokens.
    Before its first text it compares the loop that writes with the teacher's own pass.
    """
    theirs, key = shapes.taught_by
    weights = Part("the teacher's weights", theirs.weights * machine.dtype.itemsize, key)
    held = [libraries.part(machine, writing=True), weights]
    sources = list(generated(config.data))
    rows = sorted((list(_rows(*one, theirs, machine)) for one in sources), key=_bytes)
    if sources:
        turn = max((_turn(*one, theirs, machine) for one in sources), key=lambda part: part.bytes)
        yield [*held, *chain(*rows), turn]
        positions = max(longest(source, theirs) + source.answer_tokens for _, source in sources)
        yield [*held, *chain(*rows[1:]), *widened(theirs.weights, positions, theirs, machine)]


def generated(data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """The sources that the teacher writes, with the beginning of their keys."""
    for place, part in enumerate(mix.parts(data)):
        if part.source is DataSource.selfgen:
            yield f"data.parts[{place}]." if data.parts else "data.", part


def starts(source: DataConfig, vocabulary: int) -> int:
    """From how many starts the teacher writes for a source, as far as anybody knows before prompts are read."""
    there = {
        Start.prompts: PROMPTS if not source.path else 1,
        Start.tokens: vocabulary,
        Start.openings: source.documents or 1,
        Start.questions: source.documents or 1,
    }[source.start]
    modes = 2 if source.thinking == "both" and source.start in (Start.prompts, Start.questions) else 1
    return min(there, source.documents or there) * modes


def written(source: DataConfig, theirs: Shapes, machine: Machine) -> Batches:
    """How the texts of a source are written, as the writing itself decides it."""
    sampling = Sampling(source.answer_tokens, source.greedy_tokens, source.temperature, ())
    texts = starts(source, theirs.vocabulary) * source.answers
    return batches(theirs.config, machine, texts, longest(source, theirs), sampling)


def longest(source: DataConfig, theirs: Shapes) -> int:
    """Tokens of the longest prompt of a source, or those that are taken for it."""
    if source.start is Start.questions:
        return LONGEST + source.answer_tokens
    if source.start is Start.prompts:
        return theirs.longest_prompt(source) or LONGEST
    return {Start.tokens: FIRST, Start.openings: OPENING[1]}[source.start]


def _rows(where: str, source: DataConfig, theirs: Shapes, machine: Machine) -> Iterator[Part]:
    """What a source holds from its first text to its last."""
    count, how = starts(source, theirs.vocabulary), written(source, theirs, machine)
    key = _number(where, source, theirs)
    yield Part("the list of all answers", 2 * REFERENCE * count * source.answers, key, host=True)
    yield from rows_of_text(how.rows, how.row_bytes, f"{where}answer_tokens", key, machine)


def _turn(where: str, source: DataConfig, theirs: Shapes, machine: Machine) -> Part:
    """What a source takes in its turn: of prompts what passes through a layer, or of tokens the logits."""
    how, key = written(source, theirs, machine), _number(where, source, theirs)
    read = min(TOKENS_AT_ONCE, how.rows * longest(source, theirs)) * passing(theirs, machine.dtype.itemsize)
    chosen = how.rows * how.turn_bytes
    if read >= chosen:
        return Part("prompts that are read", read, key, least=False)
    return Part("logits", chosen, key, least=False)


def _number(where: str, source: DataConfig, theirs: Shapes) -> str:
    """The key that makes texts fewer."""
    return where + ("documents" if starts(source, theirs.vocabulary) > source.answers else "answers")


def _bytes(parts: list[Part]) -> float:
    return sum(part.bytes for part in parts)


def rows_of_text(rows: int, row_bytes: float, longer: str, more: str, machine: Machine) -> Iterator[Part]:
    """What rows hold while they are written; `longer` is the key of their length, `more` that of their number."""
    gpu = machine.device.type == "cuda"  # on which memory that ran out would be told
    yield Part(
        "keys, values and logits of a row" if gpu else "keys and values",
        row_bytes * (1 if gpu else rows),
        longer,
    )
    if gpu:
        yield Part(f"{rows - 1:,} rows more", row_bytes * (rows - 1), more, least=False)


def cache(config: Config, shapes: Shapes, machine: Machine) -> list[Part]:
    """The teacher's outputs, row by row."""
    theirs, key = shapes.taught_by
    dtype, settings = machine.dtype.itemsize, config.cache
    many, few = POSITIONS[kind(machine)]
    logits = RECORDED * many + (0 if machine.device.type == "cuda" else 2 * few)
    recorded = min(SHARD_ROWS, settings.sequences or SHARD_ROWS) * (settings.length - 1)
    a_position = settings.top_k * (IDS + LOGPROBS) + settings.random * LOGPROBS
    rows = min(machine.micro_batch, SHARD_ROWS)
    if reads(config, theirs, machine):
        held, rows = reading(theirs, dtype, 1, key), SHARD_ROWS
    else:
        held = [Part("the teacher's weights", theirs.weights * dtype, key)]
    tokens = min(machine.micro_batch, rows) * settings.length
    return [
        libraries.part(machine),
        *held,
        Part("logits", FP32 * logits * theirs.vocabulary, MODEL, least=False),
        Part("what passes through a layer", tokens * passing(theirs, dtype), "instance.micro_batch", least=False),
        Part("hidden states", rows * settings.length * theirs.hidden * dtype, "instance.micro_batch", least=False),
        Part("what is kept of a shard", recorded * a_position, "cache.top_k", least=False),
    ]


def reads(config: Config, theirs: Shapes, machine: Machine) -> bool:
    """Whether the teacher's decoder layers are read one at a time for a cache."""
    short = not capacity.roomy(theirs.weights * machine.dtype.itemsize, machine.device)
    return theirs.streams and (config.stage is Stage.convert or short)


def comparison(config: Config, shapes: Shapes, machine: Machine, layers: bool = False) -> list[Part]:
    """A model beside itself in fp32, on two rows; `layers` are read one at a time."""
    dtype = machine.dtype.itemsize
    if layers:
        weights, count = reading(shapes, dtype, 1), shapes.outside + shapes.layer
    else:
        weights, count = [Part("the model's weights", shapes.weights * dtype, MODEL)], shapes.weights
    return [libraries.part(machine), *weights, *widened(count, config.cache.length, shapes, machine)]


def widened(weights: int, length: int, shapes: Shapes, machine: Machine) -> list[Part]:
    """What a comparison on rows of some length takes beside a model of which so many weights are in memory."""
    wide = FP32 if machine.dtype.itemsize < FP32 else 0
    return [
        # Where a GPU has no room for them they are in host memory
        Part("the weights in fp32", weights * wide, MODEL, least=False),
        Part("logits of a row", FP32 * 2 * length * shapes.vocabulary, "cache.length", least=False),
        Part("log-probabilities", FP32 * COMPARED_COPIES * COMPARED * shapes.vocabulary, MODEL, least=False),
        Part("what passes through a layer", 2 * length * passing(shapes, FP32), "cache.length", least=False),
    ]


def reading(shapes: Shapes, dtype: int, models: int, key: str = MODEL) -> list[Part]:
    """What is in memory of models whose decoder layers are read one at a time; they share what is outside of these."""
    return [
        Part("embedding, head and norms", shapes.outside * dtype, key),
        Part("a decoder layer", models * shapes.layer * dtype, key),
    ]


def compared(shapes: Shapes, machine: Machine, copies: int) -> Part:
    """Logits of student and teacher at the positions that are compared together."""
    positions = positions_at_once(kind(machine), shapes.vocabulary)
    return Part("logits", FP32 * copies * positions * shapes.vocabulary, MODEL, least=False)


def row_bytes(config: Config, vocabulary: int) -> int:
    """Bytes of a training row in a cache."""
    answers = config.loss.kind.needs_answers
    meta = {"length": config.cache.length, "top_k": config.cache.top_k, "random": 0, "vocab_size": vocabulary}
    meta |= {"format": FORMAT_VERSION, "answers": answers, "train_targets": config.cache.train_targets and not answers}
    return bytes_a_row(meta, "train")
