"""Memory of hidden states: what a decoder layer keeps of a token for its backward pass, and what passes through it.

The numbers kept are counted from the code: of fused layers what `qat.decoder.functions` saves, of transformers' own
what autograd saves there. D is the width of hidden states, F of queries, keys and values together, M of the outputs
of all heads, I inside the MLP; a test counts saved tensors of both.
"""

from qat import decoder
from qat.config import Packing
from qat.footprint.shapes import FP32, Shapes
from qat.machine import Machine

GATED = 2  # matrices before an MLP's activation


def kept(shapes: Shapes, machine: Machine, length: int, packing: Packing, again: bool) -> float:
    """Bytes that a decoder layer keeps of a token for its backward pass; `again` computes what is between once more."""
    dtype, fused = machine.dtype.itemsize, shapes.fuses(machine)
    if again:
        return (2 if fused else 1) * shapes.hidden * dtype
    if fused:  # two sums and their norms; the joint product; the heads' outputs; gate and up, and what they make
        numbers = 4 * shapes.hidden + shapes.joint + shapes.mixed + (GATED + 1) * shapes.inner
        sums = FP32 * shapes.heads if length - 1 > decoder.LONGEST else 0  # of each softmax, where rows are long
        return numbers * dtype + sums
    return _own(shapes, dtype, length, packing)


def _own(shapes: Shapes, dtype: int, length: int, packing: Packing) -> float:
    """By transformers' own layers, whose norms compute in fp32 and keep their inputs in it."""
    attended = shapes.joint
    if packing is Packing.joined:  # a mask in numbers, and copies of keys and values for every query head
        attended = 3 * shapes.mixed + length - 1
    numbers = 2 * shapes.hidden + attended + shapes.mixed + (GATED + 2) * shapes.inner
    wide = 2 * shapes.hidden + 2 + shapes.heads
    if shapes.norms:
        wide += (shapes.heads + shapes.shared) * (shapes.width + 1)
    return numbers * dtype + FP32 * wide


def passing(shapes: Shapes, dtype: int) -> float:
    """Bytes of a token inside a decoder layer of transformers that keeps nothing: the most of its two halves."""
    attention = shapes.hidden + shapes.joint + 2 * shapes.mixed
    return dtype * (2 * shapes.hidden + max(attention, (GATED + 1) * shapes.inner))


def backward(shapes: Shapes, dtype: int) -> float:
    """Bytes of a token in gradients inside one decoder layer, beside what is kept."""
    return dtype * (3 * shapes.hidden + max(shapes.joint + shapes.mixed, (GATED + 1) * shapes.inner))
