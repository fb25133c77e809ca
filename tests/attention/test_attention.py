"""Short rows' attention: the kernel against float64, and through transformers' models."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from qat import attention
from qat import rows as masks
from qat.forward import FAST, hidden_states, prepare, use
from qat.masks import of_documents
from tests.devices import DEVICES

CHECK = """
import os, sys
device = sys.argv[1]
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch.nn.functional import scaled_dot_product_attention
from qat.attention import kernels

draw = torch.Generator().manual_seed(0)

def tensor(*shape):
    return torch.randn(*shape, generator=draw)

def documents(rows, length):
    starts = torch.rand(rows, length, generator=draw) < 0.2
    number, places = starts.cumsum(1), torch.arange(length)
    return ((number[:, :, None] == number[:, None, :]) & (places[:, None] >= places))[:, None]

CASES = [(2, 4, 2, 16, 16), (2, 3, 3, 20, 24), (1, 9, 3, 7, 64), (1, 2, 1, 65, 8), (2, 4, 2, 64, 128)]
CASES += [(1, 4, 1, 128, 64), (1, 2, 1, 127, 128)]
DTYPES = {"cpu": {torch.float32: 1e-5}, "cuda": {torch.bfloat16: 2e-2, torch.float16: 3e-3}}
for rows, heads, shared, length, width in CASES:
    for masked in (False, True):
        for dtype, error in DTYPES[device].items():
            # as a model makes them: heads beside each other in a token
            parts = [tensor(rows, length, h, width).to(dtype).transpose(1, 2) for h in (heads, shared, shared)]
            grad = tensor(rows, length, heads, width).to(dtype)
            mask = documents(rows, length) if masked else None
            exact = [part.double().requires_grad_() for part in parts]
            q, k, v = exact[0], *(x.repeat_interleave(heads // shared, 1) for x in exact[1:])
            expected = scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, scale=0.3).transpose(1, 2)
            wanted = torch.autograd.grad(expected, exact, grad.double())
            there = [part.to(device) for part in parts]
            mask = None if mask is None else mask.to(device)
            found = kernels.forward(*there, mask, 0.3)
            grads = kernels.backward(grad.to(device), *there, mask, 0.3)
            for one, other in zip((found, *grads), (expected, *wanted)):
                assert (one.double().cpu() - other).norm() <= error * other.norm(), (rows, heads, length, dtype, masked)
            assert all(one.stride() == part.stride() for one, part in zip(grads, parts))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_compute_what_float64_does(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MODEL = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_a_model_gives_what_float64_gives(compiled, joined):
    torch.manual_seed(0)
    exact = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**MODEL)).double().requires_grad_(True)
    model = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    use(model, FAST)
    prepare(model, compiled)
    ids = torch.randint(200, (3, 40))
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[:, [0, 11, 12, 30]] = True
    given = masks.inputs(ids, starts if joined else None)
    wanted = hidden_states(exact, given)
    found = hidden_states(model, {name: value.cuda() for name, value in given.items()})
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    found.backward(grad.cuda().bfloat16())
    assert (found.double().cpu() - wanted).norm() < 0.02 * wanted.norm()
    for one, other in zip(model.base_model.layers.parameters(), exact.base_model.layers.parameters(), strict=True):
        assert (one.grad.double().cpu() - other.grad).norm() < 0.05 * other.grad.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_without_kernels_it_is_what_float64_gives(masked):
    """As on a GPU that cannot hold a row's scores; gradients lie in memory as what they are gradients of."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 9, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 2, 2)]
    grad = torch.randn(2, 9, 6, 8)
    mask = of_documents(masks.inputs(torch.zeros(2, 9), torch.rand(2, 9) < 0.3)["position_ids"]) if masked else None
    exact = [part.detach().double().requires_grad_() for part in parts]
    q, k, v = exact[0], *(x.repeat_interleave(3, 1) for x in exact[1:])
    wanted = scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, scale=0.3).transpose(1, 2)
    found = attention.short(*parts, mask, 0.3)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    for one, part, other in zip(
        torch.autograd.grad(found, parts, grad), parts, torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert torch.allclose(one.double(), other, atol=1e-5)
        assert one.stride() == part.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_kernels_large_scores_keep_their_digits(dtype):
    """Scores of some hundreds, rounded to 16 bits, would be off by more than one."""
    torch.manual_seed(0)
    parts = [(torch.randn(2, heads, 16, 32) * size).to(dtype) for heads, size in ((4, 30), (2, 3), (2, 1))]
    grad = torch.randn(2, 16, 4, 32).to(dtype)
    exact = [part.double().requires_grad_() for part in parts]
    q, k, v = exact[0], *(x.repeat_interleave(2, 1) for x in exact[1:])
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2).transpose(1, 2)
    for one, other in zip(
        attention.short_backward(grad, *parts, None, 0.2),
        torch.autograd.grad(wanted, exact, grad.double()),
        strict=True,
    ):
        assert (one.double() - other).norm() < 0.005 * other.norm()


def test_on_a_cpu_it_is_what_pytorch_computes():
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**MODEL)).eval()
    ids = torch.randint(200, (3, 40))
    with torch.no_grad():
        wanted = model(ids).logits
        model.set_attn_implementation(attention.NAME)
        assert torch.equal(model(ids).logits, wanted)
