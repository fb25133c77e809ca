"""The head's kernels: on a GPU as they are, elsewhere in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import DEVICES

CHECK = """
import os, sys
device = sys.argv[1]
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from qat.distill import kernels
draw = torch.Generator().manual_seed(0)
for P, V, D, K in [(5, 9000, 70, 5), (3, 4096, 128, 64), (2, 130, 300, 1)]:
    E, h, f = (torch.randn(*shape, generator=draw).to(device) for shape in [(V, D), (P, D), (P, K)])
    ids = torch.stack([torch.randperm(V, generator=draw)[:K] for _ in range(P)]).to(device)
    rows = E.double()[ids]
    assert torch.allclose(kernels.dot_rows(E, ids, h).double(), (rows * h.double()[:, None]).sum(-1), atol=1e-4)
    combined = (rows * f.double()[..., None]).sum(1)
    assert torch.allclose(kernels.combine_rows(E, ids, f, torch.float32).double(), combined, atol=1e-4)
    logits = torch.randn(P, V, generator=draw).to(device) * 20
    sums = kernels.log_sum_exp(logits)
    assert torch.allclose(sums.double(), logits.double().logsumexp(-1), atol=1e-4)
    c = torch.randn(P, generator=draw).to(device)
    expected = logits.double().softmax(-1) * c.double()[:, None]
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        found = kernels.softmax_times(logits, sums, c, dtype).double()
        assert torch.allclose(found, expected, rtol=error, atol=1e-7), dtype
    other = logits.roll(1, 1) * 0.7
    for T in (1.0, 2.5):
        p, q = ((x.double() / T).log_softmax(-1) for x in (other, logits))
        kl, *both = kernels.divergence(logits, other, T)
        assert torch.allclose(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=2e-5)
        for found, x in zip(both, (logits, other)):
            assert torch.allclose(found.double(), (x.double() / T).logsumexp(-1), atol=2e-5)
        expected = (q.exp() - p.exp()) * c.double()[:, None]
        for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 8e-3)):
            found = kernels.divergence_gradient(logits, other, *both, T, c, dtype).double()
            assert torch.allclose(found, expected, rtol=error, atol=1e-6), (T, dtype)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_compute_what_plain_torch_does(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
