"""Attention's programs fit into the shared memory of GPUs that are not here: compiled for them, launched on none."""

import pytest
import torch

from qat.attention import flash, kernels
from qat.decoder import attention as fused

GPUS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # shared memory that a program of each architecture can have
SHAPES = [(63, 128), (127, 64), (127, 128)]  # tokens of a row, dimensions of a head
HEADS = {64: (9, 3), 128: (16, 8)}
FITS_BACK = {80: SHAPES, 86: [(63, 128), (127, 64)], 90: SHAPES}  # without the norms and rotations of a layer


def needed(kernel, types, constants, architecture, aligned=(), **launch):
    """Bytes of shared memory; `aligned` arguments are multiples of 16, which decides what is loaded ahead."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types(name) for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch).metadata.shared


def kind(name):
    if name in ("scale", "epsilon", "factor"):
        return "fp32"
    if name in ("sums", "alongs", "spans"):
        return "*i32" if name == "spans" else "*fp32"
    if name == "L":
        return "i32"
    return "*u8" if name == "mask" else "i32" if name.endswith(("_row", "_head", "_token")) else "*bf16"


@pytest.mark.parametrize("architecture", GPUS)
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_programs_fit(architecture, length, width, monkeypatch):
    pytest.importorskip("triton")
    room, (query, shared) = GPUS[architecture], HEADS[width]
    monkeypatch.setattr(kernels, "capable", lambda device: True)
    for module in (kernels, fused):
        monkeypatch.setattr(module, "shared_memory", lambda device: room)
    turns = torch.empty(1, length, width)
    places = fused.Places(turns, turns, torch.ones(1))
    constants = fused._constants(places, (turns, turns), fused.Heads(query, shared, width, 1.0, 1e-6))
    there = turns.device
    forward, backward = fused._forward_cut(constants, there), fused._backward_cut(constants, there)
    assert needed(fused._forward, kind, constants, architecture, **forward) <= room
    launch = {name: value for name, value in backward.items() if name != "QUERIES"}
    constants |= {"QUERIES": backward["QUERIES"]}
    assert needed(fused._backward, kind, constants, architecture, **launch) <= room

    q = torch.empty(1, query, length, width)
    names = ("L", "D", "GROUP", "TOKENS", "WIDTH", "MASKED")
    sizes = dict(zip(names, kernels._sizes(q, torch.empty(1, shared, length, width), torch.ones(1)), strict=True))
    assert needed(kernels._forward, kind, sizes, architecture) <= room
    assert kernels.goes_back(q) == ((length, width) in FITS_BACK[architecture])
    if kernels.goes_back(q):
        sizes |= {"QUERIES": min(kernels.QUERIES, sizes["TOKENS"])}
        assert needed(kernels._backward, kind, sizes, architecture, **kernels.BACKWARD) <= room


@pytest.mark.parametrize("architecture", GPUS)
def test_programs_of_long_rows_fit(architecture, monkeypatch):
    pytest.importorskip("triton")
    room, (query, shared) = GPUS[architecture], HEADS[kernels.WIDEST]
    monkeypatch.setattr(flash, "shared_memory", lambda device: room)
    q, k = (torch.empty(1, heads, 200, kernels.WIDEST) for heads in (query, shared))
    constants = flash._constants(q, k, torch.ones(1))
    for kernel, cuts, small in (
        (flash._forward, flash.FORWARD, flash.SMALL),
        (flash._to_queries, flash.TO_QUERIES, flash.SMALL),
        (flash._to_keys, flash.TO_KEYS, flash.SMALL_TO_KEYS),
    ):
        launch = dict(flash._cut(cuts, small, q))
        sizes = constants | {name: launch.pop(name) for name in ("QUERIES", "KEYS")}
        aligned = [name for name in kernel.arg_names if name not in sizes and name != "L" and kind(name) != "fp32"]
        assert needed(kernel, kind, sizes, architecture, aligned, **launch) <= room
