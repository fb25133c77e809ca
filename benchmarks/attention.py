"""Attention by itself: rows of several lengths with as many tokens, ours beside what PyTorch has.

    python benchmarks/attention.py                        # SmolLM2-135M's heads and Qwen3-0.6B's
    python benchmarks/attention.py --model qwen3 --flex   # beside PyTorch's flex_attention, too
    python benchmarks/attention.py --cuts                 # other sizes of blocks, for another GPU

Milliseconds of one layer's forward and backward pass in bf16 over random numbers, and how far outputs and gradients
of one row are from float64. Rows that documents share are measured beside rows of one document.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from qat import attention, masks
from qat.attention import flash, kernels

try:
    from triton.errors import TritonError
except ImportError:  # no CUDA build of torch
    FAILURES: tuple[type[Exception], ...] = (RuntimeError,)
else:
    FAILURES = (RuntimeError, TritonError)

HEADS = {"smollm2": (9, 3, 64), "qwen3": (16, 8, 128)}  # queries, keys and width, from the models' config.json files
BLOCKS: dict[str, list[tuple[int, int]]] = {  # queries and keys of a block
    "FORWARD": [(128, 64), (128, 128), (128, 32), (64, 64)],
    "TO_QUERIES": [(128, 64), (64, 64), (128, 32), (64, 32)],
    "TO_KEYS": [(64, 128), (64, 64), (32, 128), (32, 64)],
}
LAUNCHES = [(4, 3), (8, 3), (8, 2)]  # warps and stages

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Every model asked for."""
    options = arguments()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    lines = []
    for model in options.model:
        for line in cuts(model, options) if options.cuts else table(model, options):
            print(
                *(f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in line.items()),
                flush=True,
            )
            lines.append(line)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(lines, file, indent=1)


def table(model: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each length, kind of rows and way."""
    for length in options.length:
        for document in (options.document, length):
            if document > length:
                continue
            positions = None if document == length else torch.arange(length, device="cuda") % document
            for name in ("qat", "pytorch", "flex") if options.flex else ("qat", "pytorch"):
                line: dict[str, Any] = {"model": model, "length": length, "document": document, "way": name}
                try:
                    line |= times(name, model, options.tokens // length, length, positions)
                    line |= errors(name, model, length, positions)
                except FAILURES as error:  # the others are still worth having
                    line["failed"] = str(error).strip().partition("\n")[0][:200]
                yield line


def way(name: str, positions: Tensor | None) -> Way:
    """How attention is computed. `positions` [B, L] restart in each document; None for one document a row.

    Their masks are made here, outside of what is timed: layers share them.
    """
    if name == "flex":
        return _flex(positions)
    mask = None if positions is None else masks.of_documents(positions)
    if name == "pytorch":
        return lambda q, k, v: _pytorch(q, k, v, mask)
    spans = None if positions is None else masks.spans_of_documents(positions)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if q.shape[2] <= kernels.LONGEST:
            return attention.short(q, k, v, mask, scale)
        return attention.long(q, k, v, spans, scale)[0]

    return ours


def _pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers calls it."""
    if mask is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _flex(positions: Tensor | None) -> Way:
    number = None if positions is None else masks.documents(positions)
    compiled: Any = torch.compile(flex_attention)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k if number is None else (q >= k) & (number[b, q] == number[b, k])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, _, length, _ = q.shape
        if length not in blocks:
            blocks[length] = create_block_mask(seen, None if number is None else rows, None, length, length)
        return compiled(q, k, v, block_mask=blocks[length], enable_gqa=True).transpose(1, 2)

    blocks: dict[int, Any] = {}
    return attend


def draw(model: str, rows: int, length: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values [B, heads, L, D] as a model makes them, and a gradient of the outputs."""
    heads, shared, width = HEADS[model]
    torch.manual_seed(0)

    def tensor(heads: int) -> Tensor:
        return torch.randn(rows, length, heads, width, device="cuda", dtype=torch.bfloat16)

    return [tensor(n).transpose(1, 2).requires_grad_() for n in (heads, shared, shared)], tensor(heads)


def times(name: str, model: str, rows: int, length: int, positions: Tensor | None) -> dict[str, float]:
    """Milliseconds forward and backward."""
    parts, grad = draw(model, rows, length)
    compute = way(name, None if positions is None else positions.expand(rows, -1))
    out = compute(*parts)
    return {
        "forward_ms": timed(lambda: compute(*parts)),
        "backward_ms": timed(lambda: torch.autograd.grad(out, parts, grad, retain_graph=True)),
    }


def timed(work: Callable[[], Any], repeats: int = 20) -> float:
    """The median of some, after three that are not counted."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return sorted(one.elapsed_time(other) for one, other in pairwise(marks))[repeats // 2]


def errors(name: str, model: str, length: int, positions: Tensor | None) -> dict[str, float]:
    """How far outputs and gradients are from float64, over the size of these."""
    parts, grad = draw(model, 1, length)
    here = None if positions is None else positions[None]
    exact = [part.detach().double().requires_grad_() for part in parts]
    found, wanted = way(name, here)(*parts), way("pytorch", here)(*exact)
    pairs = zip(
        ("out", "dq", "dk", "dv"),
        (found, *torch.autograd.grad(found, parts, grad)),
        (wanted, *torch.autograd.grad(wanted, exact, grad.double())),
        strict=True,
    )
    return {key: float((one.double() - other).detach().norm() / other.detach().norm()) for key, one, other in pairs}


def cuts(model: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each way to cut one of the kernels, the others as they are: forward, or forward and backward."""
    tries = [
        (model, options.tokens, max(options.length), options.document, kernel, queries, keys, warps, stages)
        for kernel, blocks in BLOCKS.items()
        for queries, keys in blocks
        for warps, stages in LAUNCHES
    ]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, tries))  # in Triton's cache, from which they are taken below
    for one in tries:
        names = ("model", "tokens", "length", "document", "kernel", "queries", "keys", "warps", "stages")
        yield dict(zip(names, one, strict=True)) | cut(*one, repeats=10)


def compiled(one: tuple[Any, ...]) -> None:
    """Compiles what `cut` measures."""
    cut(*one, repeats=1)


def cut(
    model: str, tokens: int, length: int, document: int, kernel: str, *sizes: int, repeats: int
) -> dict[str, float | str]:
    """Milliseconds with a kernel cut as asked for, over rows of documents and over rows of one."""
    width, rows = HEADS[model][2], tokens // length
    table: dict[int, flash.Cut] = getattr(flash, kernel)
    before = table[width]
    table[width] = dict(zip(("QUERIES", "KEYS", "num_warps", "num_stages"), sizes, strict=True))
    places = torch.arange(length, device="cuda").expand(rows, -1)
    parts, grad = draw(model, rows, length)
    q, k, v = (part.detach() for part in parts)
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    found: dict[str, float | str] = {}
    try:
        for name, positions in (("documents_ms", places % document), ("whole_ms", places)):
            spans = masks.spans_of_documents(positions)

            def work(spans: Tensor = spans) -> None:
                out, sums = flash.forward(q, k, v, spans, width**-0.5)
                if kernel != "FORWARD":
                    flash.backward(grad, q, k, v, out, sums, spans, width**-0.5, into)

            found[name] = timed(work, repeats)
    except FAILURES as error:  # most often too much shared memory
        found["failed"] = str(error).strip().partition("\n")[0][:200]
    finally:
        table[width] = before
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--length", nargs="+", type=int, default=[127, 1023, 2047], help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=16384, help="of all rows together, at most")
    parser.add_argument("--document", type=int, default=700, help="tokens of each document where several share a row")
    parser.add_argument("--flex", action="store_true", help="flex_attention, too")
    parser.add_argument("--cuts", action="store_true", help="sizes of blocks for the longest rows, instead")
    parser.add_argument("--processes", type=int, default=12, help="that compile for --cuts")
    parser.add_argument("--json", help="write the lines there, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
