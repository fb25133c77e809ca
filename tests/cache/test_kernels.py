"""The kernel behind a cache's top-k: on a GPU as it is, elsewhere in Triton's interpreter, in a process of its own."""

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
from qat.cache import kernels
from qat.cache.topk import most_likely
draw = torch.Generator().manual_seed(0)
for positions, vocabulary, top_k in [(3, 9000, 5), (2, 64, 1), (2, 4096, 20), (1, 4161, 32)]:
    for dtype in (torch.float32, torch.bfloat16):
        logits = (20 * torch.randn(positions, vocabulary, generator=draw)).to(dtype)
        logits[0, -1] = 300
        logits = logits.to(device)
        log_sum, maxima = kernels.summary(logits)
        assert torch.allclose(log_sum.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-5)
        padded = torch.nn.functional.pad(logits.float(), (0, -vocabulary % 64), value=-torch.inf)
        assert torch.equal(maxima, padded.unflatten(1, (-1, 64)).amax(-1))
        top, ids = most_likely(logits, top_k, maxima)
        assert torch.equal(top, logits.sort(-1, descending=True).values[:, :top_k])
        assert torch.equal(logits.gather(-1, ids), top) and all(len(row.unique()) == top_k for row in ids)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_sums_and_finds_what_plain_torch_does(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
