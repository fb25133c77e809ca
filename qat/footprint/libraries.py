"""What libraries take, measured: no arithmetic tells it."""

import torch

from qat.footprint.shapes import Part
from qat.machine import Machine

WHAT = "libraries"
# Bytes by kind of device, which count as taken: cuBLAS's work space of every stream and thread, 0.20 to 0.24 GB on an
# H200; on a CPU what oneDNN packs weights into, and code that is loaded when it is first used
TAKEN = {"cuda": 2.4e8, "cpu": 1.0e8}
# Share of it that a CPU has taken while text is written, before anything else: little is loaded, and little packed
WRITING = 0.25
# Bytes on a CPU with instructions for bf16: what oneDNN keeps for every shape of such products, half of it until
# training has had them all (in the end 0.13 to 0.17 GB with AMX, 0.25 with AVX-512 alone; in fp32 next to nothing)
PRODUCTS = 1.4e8
# Bytes of a GPU that are taken after a run has begun but by no tensor: code of kernels, and what their threads may
# spill (an H200 has 0.7 GB taken before the first tensor and 2.25 to 2.36 GB later)
BESIDE = 1.6e9
# Share of the activations of a step that malloc holds besides, as pieces between tensors: torch asks for aligned ones,
# which rarely fit where one of the same size was (glibc 2.36; 0.4 after two steps, 0.6 after 40, docs/log/memory.md)
PIECES = 0.5


def part(machine: Machine, host: bool = False, late: bool = False, writing: bool = False) -> Part:
    """As a part of any phase.

    Args:
        machine: the one that computes.
        host: the phase is in host memory and fp32.
        late: it has had products of all shapes.
        writing: it is the first, in which text is written.
    """
    kind = "cpu" if host else machine.device.type
    if writing and kind == "cpu":
        return Part(WHAT, WRITING * TAKEN[kind], "instance", least=False)
    short = machine.dtype is torch.bfloat16 and kind == "cpu" and not host
    products = PRODUCTS * (1 if late else 0.5) if short else 0
    return Part(WHAT, TAKEN.get(kind, TAKEN["cpu"]) + products, "instance", host=host, least=False)
