"""What a packed export costs to run, side by side with the dense model.

    python benchmarks/export.py generation --packed <folder> --dense <folder>   # both exports, greedy tokens/s
    python benchmarks/export.py vocabulary [--threads 2]                        # one token, embedding and tied head
    python benchmarks/export.py product                                         # one token, CUDA, shapes of Qwen3-0.6B
    python benchmarks/export.py product --sweep                                 # every tiling of each shape, best first

`vocabulary` looks one row up and multiplies a state with all of them, at the shape of SmolLM2-135M with random
numbers; the first call of a packed pair multiplies its weight out. `product` walks over so many layers of one shape
that no weight is still in the L2 cache when its turn comes again, as in a model, and measures both the bare kernels
(CUDA graph) and calls from Python (eager).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qat  # noqa: F401 - registers packed exports
from qat.machine import computes_bf16
from qat.packed.linear import PackedEmbedding, PackedLinear, PackedTiedHead
from qat.quant.formats import Codebook, Format, GroupGrid
from qat.quant.formats import codebook_product as kernel
from qat.quant.formats.codebook_product import Tiling

SHAPES = {  # outputs, inputs of Qwen3-0.6B
    "q": (2048, 1024),
    "k, v": (1024, 1024),
    "o": (1024, 2048),
    "gate, up": (3072, 1024),
    "down": (1024, 3072),
}
CODEBOOKS = ((2, 32), (2, 8), (3, 8), (4, 8), (4, 4))  # bits, rank
TOKENS, HIDDEN = 49_152, 576  # of SmolLM2-135M
VOCABULARIES: dict[str, Format | None] = {
    "dense": None,
    "codebook, 4 bits, rank 16": Codebook(4, 16),
    "grid, 8 bits": GroupGrid(8, 64),
}
DENSE_BYTES = 400_000_000  # of all layers walked over: several times any L2 cache
REPEATS = 20
SWEPT_CODEBOOKS = ((2, 32), (2, 8), (4, 8))
SWEEP = [  # rows, columns, warps
    *(Tiling(16, 2048, 16), Tiling(16, 1024, 8), Tiling(16, 1024, 16), Tiling(32, 1024, 16)),
    *(Tiling(16, 512, 4), Tiling(16, 512, 8), Tiling(32, 512, 8), Tiling(32, 256, 4), Tiling(64, 256, 8)),
]


def main() -> None:
    """One of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generation", "vocabulary", "product"])
    parser.add_argument("--packed", help="folder of a packed export")
    parser.add_argument("--dense", help="folder of an hf export")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--sweep", action="store_true", help="try every tiling")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    match options.what:
        case "generation":
            generation(options)
        case "vocabulary":
            vocabulary()
        case "product":
            product(options.sweep)


def generation(options: argparse.Namespace) -> None:
    """Greedy tokens a second of both models, by turns, so that a busy machine slows both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: load(getattr(options, name), device) for name in ("dense", "packed")}
    tokenizer = AutoTokenizer.from_pretrained(options.dense, trust_remote_code=False)
    ids = torch.tensor([tokenizer.encode("The capital of France is")], device=device)
    settings = GenerationConfig(max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(6):
        for name, model in models.items():
            began = time.perf_counter()
            model.generate(ids, generation_config=settings)
            if turn:  # the first one multiplies weights out and compiles kernels
                seconds[name].append(time.perf_counter() - began)
    for name, model in models.items():
        speed = options.tokens / statistics.median(seconds[name])
        print(f"{name:8} {model.dtype!s:15} {speed:7.1f} tokens/s (median of {len(seconds[name])} by turns)")
    ratios = [dense / packed for dense, packed in zip(seconds["dense"], seconds["packed"], strict=True)]
    print(f"packed is {statistics.median(ratios):.2f} times as fast as dense")


@torch.inference_mode()
def vocabulary() -> None:
    """Milliseconds of embedding and head for one token, by turns, and the seconds of the first call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    pairs = {name: vocabulary_pair(format, dtype, device) for name, format in VOCABULARIES.items()}
    spent: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(REPEATS + 1):
        for name, (embedding, head) in pairs.items():
            ids = torch.tensor([[turn]], device=device)
            began = time.perf_counter()
            head(embedding(ids)).argmax(-1).item()
            spent[name].append(time.perf_counter() - began)
    print(f"{device}, {torch.get_num_threads()} threads, {dtype}: first call, then the median of {REPEATS}")
    usual = statistics.median(spent["dense"][1:])
    for name, (first, *others) in spent.items():
        later = statistics.median(others)
        print(f"{name:28}{first:8.2f} s {later * 1e3:8.2f} ms {later / usual:6.2f} times dense")


def vocabulary_pair(format: Format | None, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """An embedding and the head that is tied to it, with random numbers."""
    embedding = nn.Embedding(TOKENS, HIDDEN, dtype=dtype, device=device)
    if format is None:
        head = nn.Linear(HIDDEN, TOKENS, bias=False, device="meta")
        head.weight = embedding.weight
        return embedding, head
    packed = PackedEmbedding(format, embedding).to(device)
    packed.indices.random_(256)
    for part in packed.parts().values():
        part.uniform_(-0.1, 0.1)
    return packed, PackedTiedHead(packed, None)


def load(folder: str, device: str) -> torch.nn.Module:
    """A model in the type it was exported in."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, trust_remote_code=False).eval()


def product(sweep: bool) -> None:
    """Microseconds a layer of the dense bf16 product and of the fused packed one."""
    print(torch.cuda.get_device_name(), torch.__version__)
    heads = f"{'dense':>7} {'packed':>7}"
    print(f"{'layer':10} {'bits':>4} {'rank':>4} {heads} {'ratio':>6}   eager: {heads}   microseconds")
    for (name, shape), (bits, rank) in itertools.product(SHAPES.items(), SWEPT_CODEBOOKS if sweep else CODEBOOKS):
        count = max(2, DENSE_BYTES // (2 * shape[0] * shape[1]))
        x = torch.randn(shape[1], device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        layers = [layer(*shape, bits, rank) for _ in range(count)]
        dense = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
        cuts = [cut for cut in SWEEP if cut.columns < 2 * shape[1]] if sweep else [kernel.tiling(*shape)]
        times = {cut: timed(packed_calls(layers, x, cut)) for cut in cuts}
        best = min(times, key=lambda cut: times[cut][0])
        (ours, ours_eager), (theirs, theirs_eager) = times[best], timed(dense)
        row = f"{name:10} {bits:4} {rank:4} {theirs:7.2f} {ours:7.2f} {theirs / ours:6.2f}          "
        print(row + f"{theirs_eager:7.2f} {ours_eager:7.2f}", flush=True)
        if sweep:
            print("    rows x columns x warps: " + ranking({cut: time for cut, (time, _) in times.items()}), flush=True)


def ranking(times: dict[Tiling, float]) -> str:
    """Every tiling with its microseconds, the fastest first."""
    ranked = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{cut.rows}x{cut.columns}x{cut.warps} {time:.2f}" for cut, time in ranked)


def layer(outputs: int, inputs: int, bits: int, rank: int) -> PackedLinear:
    """A packed layer with random content."""
    made = PackedLinear(Codebook(bits, rank), outputs, inputs, bias=False).cuda()
    made.indices.random_()
    for part in made.parts().values():
        part.normal_()
    return made


def packed_calls(layers: list[PackedLinear], x: Tensor, cut: Tiling) -> list[Callable[[], Tensor]]:
    """One call of the kernel for each layer."""
    given = []
    for made in layers:
        codebook, A, B, magnitudes = made.parts().values()
        given.append((made.indices, codebook, A, magnitudes, B, made.format.bits))
    return [lambda p=p: kernel.product(x, *p, cut=cut) for p in given]


def timed(calls: list[Callable[[], Tensor]]) -> tuple[float, float]:
    """Microseconds a call, all calls in turn: replayed as a CUDA graph, and one after the other from Python."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _microseconds(graph.replay) / len(calls), _microseconds(lambda: [call() for call in calls]) / len(calls)


def _microseconds(work: Callable[[], object]) -> float:
    """Median over repeats, after a warm-up."""
    work()
    taken = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1000)
    return statistics.median(taken)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
