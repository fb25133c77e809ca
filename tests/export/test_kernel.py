"""The fused product for one token against float64: on CUDA, or in Triton's interpreter where only that is there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from qat.quant import packing
from qat.quant.formats import codebook_product as kernel
from qat.quant.formats.codebook_product import Tiling

CASES = [
    (1, 16, 64, 1),
    (2, 48, 256, 32),
    (2, 40, 200, 5),
    (3, 33, 100, 8),
    (3, 24, 200, 8),
    (6, 16, 72, 4),
    (4, 64, 128, 8),
    (5, 17, 70, 3),
    (8, 20, 96, 16),
]
SPLIT = [Tiling(32, 64, 4), Tiling(16, 32, 4)]  # rows cut into up to four, or seven, tiles


def relative_error(bits, outputs, inputs, rank, dtype, device, tiling=None):
    draw = torch.Generator().manual_seed(bits)
    index = torch.randint(2**bits, (outputs, inputs), generator=draw).to(torch.uint8)
    codebook, A, g, B = (
        torch.randn(shape, generator=draw).to(torch.float16)
        for shape in (2**bits, (outputs, rank), rank, (rank, inputs))
    )
    x = torch.randn(inputs, generator=draw).to(dtype)
    exact = (codebook.double()[index.long()] * ((A.double() * g.double()) @ B.double())) @ x.double()
    parts = [part.to(device) for part in (x, packing.pack(index, bits), codebook, A, g, B)]
    made = kernel.product(*parts, bits, tiling)
    assert kernel.product(*parts, bits, tiling).equal(made)
    assert not kernel.arrivals(made.device).counters.any()
    assert made.dtype is dtype
    return float((made.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("case", [*CASES, (2, 3072, 1024, 32), (4, 1024, 2048, 8)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.float16, 2e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("tiling", [None, *SPLIT])
def test_on_cuda(case, dtype, most, tiling):
    assert relative_error(*case, dtype, "cuda", tiling) < most


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested")
def test_in_the_interpreter():
    code = """
import torch
from tests.export.test_kernel import CASES, SPLIT, relative_error
for case in CASES:
    for tiling in (None, *SPLIT):
        error = relative_error(*case, torch.float32, "cpu", tiling)
        assert error < 5e-4, (case, tiling, error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
