"""The decoding loop's kernels against float64: on a GPU as they are, elsewhere in Triton's interpreter."""

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
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor
    def patched(tensor, *scope):  # numpy refuses to make a number of an array of one, as the interpreter would
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang_tensor = patched
import torch
from torch.nn.functional import scaled_dot_product_attention
from qat.generation import kernels
from qat.generation.sampling import choose
draw = torch.Generator().manual_seed(0)
for R, H, K, D in [(3, 6, 2, 20), (2, 9, 3, 64), (2, 16, 8, 128), (1, 4, 4, 16)]:
    T = 150
    for dtype, error in {torch.float32: 1e-5, **({} if device == "cpu" else {torch.bfloat16: 1e-2})}.items():
        q, k, v = (torch.randn(R, 1, h, D, generator=draw).to(dtype).transpose(1, 2) for h in (H, K, K))
        keys, values = (torch.randn(R, K, T, D, generator=draw).to(dtype) for _ in range(2))
        position = torch.tensor([0, 129, 64])[:R]
        there = [x.to(device) for x in (q, k, v, keys, values, position)]
        found = kernels.next_token(*there, 0.3).double().cpu()
        for r, at in enumerate(position.tolist()):
            keys[r, :, at], values[r, :, at] = k[r, :, 0], v[r, :, 0]
            wide = [x[r, :, : at + 1].double().repeat_interleave(H // K, 0) for x in (keys, values)]
            expected = scaled_dot_product_attention(q[r].double(), *wide, scale=0.3)[:, 0]
            assert (found[r, 0] - expected).norm() <= error * expected.norm(), (R, H, D, dtype)
        assert torch.equal(there[3].cpu(), keys) and torch.equal(there[4].cpu(), values)
for V in (5000, 4096, 100):
    logits = torch.randn(40, V, generator=draw) * 3
    logits[:, 7] = -torch.inf
    logits[3, : V // 2] = -torch.inf
    uniform = torch.rand(40, generator=draw)
    uniform[:3] = torch.tensor([0.0, -1.0, 1 - 2**-24])
    found = kernels.choose(logits.to(device), uniform.to(device), 0.7).cpu()
    exact = (logits.double() / 0.7).softmax(1).cumsum(1)
    expected = torch.searchsorted(exact, uniform.double()[:, None], right=True)[:, 0]
    expected[1] = logits[1].argmax()
    assert found.dtype == torch.long and (found == expected).sum() >= 39, (V, found, expected)
    assert found[1] == expected[1]
    assert (logits[torch.arange(40), found] > -torch.inf).all()
    plain = choose(logits, uniform, 0.7)
    assert (plain == expected).sum() >= 39 and plain[1] == expected[1]
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_compute_what_plain_torch_does(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
