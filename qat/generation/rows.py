"""Rows written at once and texts of a batch, from shapes alone: a plan of memory asks what the writing itself asks."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from qat import capacity
from qat.generation.loop import TEXTS_A_ROW, Sampling, bytes_a_row
from qat.machine import Machine

PROMPTS_AT_ONCE = {"cpu": 64, "mps": 64, "cuda": 4096}
SHARE = 0.25  # share of a GPU's memory for one writer, as the sources of a mixture write at the same time
# Copies of a row's logits that exist: of plain calls and of the recording; on a CPU those that a token is drawn from
LOGITS = {"cuda": 2, "mps": 3, "cpu": 3}
COMPILED_TOKENS = 10_000_000  # tokens of a writer from which compiling its step saves more time than it takes


@dataclass(frozen=True)
class Batches:
    """How texts are written.

    Attributes:
        rows: written at once.
        texts: of a batch.
        compiled: a step is.
        row_bytes: that a row has from its first token to its last: keys and values, and logits where a recording has
            them.
        turn_bytes: that it takes while a token is chosen, where nothing is recorded.
    """

    rows: int
    texts: int
    compiled: bool
    row_bytes: int
    turn_bytes: int


def batches(model: PreTrainedConfig, machine: Machine, texts: int, longest: int, sampling: Sampling) -> Batches:
    """How so many texts are written whose prompts have at most `longest` tokens."""
    compiled = machine.compile and texts * sampling.tokens >= COMPILED_TOKENS
    rows = rows_at_once(model, machine, longest, sampling)
    if not compiled:  # all rows are full to the last; a compiled step keeps the number that all sources share
        rows = -(-texts // -(-texts // rows))
    kind = machine.device.type
    held, whole = (bytes_a_row(model, longest, sampling, machine.dtype, copies) for copies in (0, LOGITS[kind]))
    return Batches(
        rows, TEXTS_A_ROW * rows, compiled, whole if kind == "cuda" else held, 0 if kind == "cuda" else whole - held
    )


def rows_at_once(model: PreTrainedConfig, machine: Machine, longest: int, sampling: Sampling) -> int:
    """Rows, from the GPU's total memory and not its free memory, so that batches stay the same."""
    most, whole = PROMPTS_AT_ONCE[machine.device.type], capacity.whole(machine.device)
    if whole is None:
        return most
    return max(1, min(most, int(SHARE * whole / bytes_a_row(model, longest, sampling, machine.dtype))))
