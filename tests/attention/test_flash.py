"""Long rows' attention: the kernels against float64, and through transformers' models."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from qat.forward import FAST, hidden_states, prepare, use
from qat.rows import inputs
from tests.devices import DEVICES

CHECK = """
import os, sys
device = sys.argv[1]
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch.nn.functional import scaled_dot_product_attention
from qat import attention, masks
from qat.attention import flash

draw = torch.Generator().manual_seed(0)

def tensor(*shape):
    return torch.randn(*shape, generator=draw)

def documents(rows, length, often):
    starts = torch.rand(rows, length, generator=draw) < often
    places = torch.arange(length)
    return masks.of_documents(places - torch.where(starts, places, 0).cummax(1).values)

def window(rows, length, size):
    away = torch.arange(length)[:, None] - torch.arange(length)
    return ((away >= 0) & (away < size)).expand(rows, 1, length, length)

def check(rows, heads, shared, length, width, mask, dtype, error):
    # as a model makes them: heads beside each other in a token
    parts = [tensor(rows, length, h, width).to(dtype).transpose(1, 2) for h in (heads, shared, shared)]
    grad = tensor(rows, length, heads, width).to(dtype)
    exact = [part.double().to(device).requires_grad_() for part in parts]
    q, k, v = exact[0], *(x.repeat_interleave(heads // shared, 1) for x in exact[1:])
    mask = None if mask is None else mask.to(device)
    expected = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=0.3).transpose(1, 2)
    wanted = torch.autograd.grad(expected, exact, grad.double().to(device))
    there, grad = [part.to(device) for part in parts], grad.to(device)
    spans = None if mask is None else masks.spans_of(mask)
    out, sums = flash.forward(*there, spans, 0.3)
    grads = tuple(torch.full_like(part, float("nan")) for part in there)
    flash.backward(grad, *there, out, sums, spans, 0.3, grads)
    for one, other in zip((out, *grads), (expected, *wanted)):
        assert (one.double() - other).norm() <= error * other.norm(), (length, width, dtype, mask is None)
    again = tuple(torch.empty_like(part) for part in there)
    flash.backward(grad, *there, out, sums, spans, 0.3, again)
    assert all(torch.equal(one, other) for one, other in zip(grads, again))

if device == "cpu":  # small blocks, so that few tokens are several of them
    for table in (flash.FORWARD, flash.TO_QUERIES):
        table[64] = {"QUERIES": 32, "KEYS": 16}
    flash.TO_KEYS[64] = {"QUERIES": 16, "KEYS": 32}
    for mask in (None, documents(2, 70, 0.05), window(2, 70, 21)):
        check(2, 2, 1, 70, 16, mask, torch.float32, 1e-5)
    check(1, 2, 2, 64, 24, documents(1, 64, 0.1), torch.float32, 1e-5)
else:
    for heads, shared, width in ((9, 3, 64), (16, 8, 128), (4, 1, 80)):
        check(2, heads, shared, 1000, width, None, torch.bfloat16, 2e-2)
        for mask in (documents(2, 1000, 0.01), documents(2, 1000, 0.2), window(2, 1000, 200)):
            check(2, heads, shared, 1000, width, mask, torch.bfloat16, 2e-2)
        check(2, heads, shared, 129, width, documents(2, 129, 0.05), torch.bfloat16, 2e-2)
    check(2, 9, 3, 1000, 64, documents(2, 1000, 0.01), torch.float16, 3e-3)
    flash.ROOMY = 1 << 30  # as on a GPU with little shared memory
    check(2, 16, 8, 300, 128, documents(2, 300, 0.02), torch.bfloat16, 2e-2)

# As an operation of torch: its gradients, and what torch.compile is told of it
dtype = torch.float32 if device == "cpu" else torch.bfloat16
parts = [tensor(1, heads, 40, 16).to(device, dtype) for heads in (2, 1, 1)]
spans = masks.spans_of(documents(1, 40, 0.1).to(device))
torch.library.opcheck(attention.long, (*(part.requires_grad_() for part in parts), spans, 0.3))

# A row whose mask is not one of spans must not pass for something.
bad = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device).tril()
bad[1, 0, 30, 3] = False
parts = [parts[0].detach().expand(2, 2, 40, 16) for _ in range(3)]
found = flash.forward(*parts, masks.spans_of(bad), 0.3)[0].isnan()
assert found[1].all() and not found[0].any()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_compute_what_float64_does(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {"whole": (transformers.Qwen3Config, {}), "windows": (transformers.MistralConfig, {"sliding_window": 150})}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_a_model_gives_what_float64_gives(kind, compiled, joined):
    made, settings = MODELS[kind]
    torch.manual_seed(0)
    exact = transformers.AutoModelForCausalLM.from_config(made(**SIZES, **settings)).double().requires_grad_(True)
    model = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    use(model, FAST)
    prepare(model, compiled)
    ids, starts = torch.randint(200, (2, 400)), torch.zeros(2, 400, dtype=torch.bool)
    starts[:, [0, 11, 12, 300]] = True
    given = inputs(ids, starts if joined else None)
    wanted = hidden_states(exact, given)
    found = hidden_states(model, {name: value.cuda() for name, value in given.items()})
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    found.backward(grad.cuda().bfloat16())
    assert (found.double().cpu() - wanted).norm() < 0.02 * wanted.norm()
    for one, other in zip(model.base_model.layers.parameters(), exact.base_model.layers.parameters(), strict=True):
        assert (one.grad.double().cpu() - other.grad).norm() < 0.05 * other.grad.norm()
