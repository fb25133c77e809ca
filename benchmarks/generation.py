"""How many tokens a second a teacher writes: the recorded decoding loop beside transformers' own `generate`.

    python benchmarks/generation.py                                # every row, SmolLM2-135M's shape
    python benchmarks/generation.py --shape qwen3 --rows 1024 2048
    python benchmarks/generation.py --model <Hugging Face folder>  # a model with its weights
    python benchmarks/generation.py --rows 4096 --profile          # and where the time goes
    python benchmarks/generation.py --ending 0.002 --tokens 2048 --rows 680 --no-peer   # texts of unlike lengths
    python benchmarks/generation.py --tiny                         # does it work at all, on any machine

A batch is `rows` prompts of 24 to 40 random tokens, each followed by `--tokens` drawn ones; nothing ends early.
`first` is the first batch of a writer in seconds, with what is compiled and recorded in it; `tokens/s` counts
written tokens alone, of the median of `--repeats` further batches, prompts included in the time. With `--ending`
each drawn token ends its answer so often; a batch then is one text a row, which waits for the longest, beside four
texts a row, of which new ones follow where others end, and tokens after an ending do not count.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from qat import models
from qat.forward import FAST, use
from qat.generation import TEXTS_A_ROW, Sampling, Writer, answers, bytes_a_row
from qat.machine import computes_bf16

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "qwen3": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 640,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
}
LONGEST = 40  # tokens of a prompt
PEER_ROWS = 1024
HEADER = f"{'':<30}{'rows':>6}{'first':>9}{'tokens/s':>12}{'ratio':>8}{'peak GB':>9}"

Batch = Callable[[int], int]  # takes a seed, writes, and gives how many tokens it wrote


def main() -> None:
    """Measures what the arguments ask for; each row is printed as soon as it is known."""
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = teacher(arguments, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    a_row = bytes_a_row(model.config, LONGEST, sampling(arguments.tokens), model.dtype) / 1e6
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {model.dtype},", end=" ")
    print(f"answers of {arguments.tokens} tokens, {a_row:.1f} MB a row\n{HEADER}", flush=True)
    peer = None
    if not arguments.no_peer:
        rows = min(PEER_ROWS, max(arguments.rows))
        peer = measure("transformers", rows, lambda: theirs(model, rows, arguments.tokens), arguments, device, None)
    for rows in arguments.rows:
        for compiled in (True, False) if device.type == "cuda" else (False,):
            label = "recorded, compiled" if compiled else "recorded" if device.type == "cuda" else "the same loop"
            for texts in (1, TEXTS_A_ROW) if arguments.ending else (1,):
                made = partial(ours, model, rows, compiled, arguments, texts)
                measure(f"{label}, {texts} a row" if arguments.ending else label, rows, made, arguments, device, peer)
        if arguments.profile:
            profile(ours(model, rows, device.type == "cuda", arguments))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--shape", choices=["smollm2", "qwen3"], default="smollm2", help="random weights of this shape")
    parser.add_argument("--rows", type=int, nargs="+", help="prompts at once; 2048, 4096 and 8192, on a CPU 64")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--ending", type=float, default=0.0, help="share of drawn tokens that end an answer")
    parser.add_argument(
        "--repeats", type=int, default=3, help="batches after the first, at least one, of which the median is told"
    )
    parser.add_argument("--no-peer", action="store_true", help="without transformers' own loop")
    parser.add_argument("--profile", action="store_true", help="where the time of a batch goes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few rows, short answers")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.rows, arguments.tokens = "tiny", [8], 20
    arguments.rows = arguments.rows or ([2048, 4096, 8192] if torch.cuda.is_available() else [64])
    return arguments


def teacher(arguments: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model of a folder, or random weights of the shape asked for."""
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float16 if device.type == "cuda" else torch.float32
    if arguments.model:
        return used_fast(models.ModelFolder("benchmark", arguments.model, "").load(dtype, device))
    kind = transformers.Qwen3Config if arguments.shape == "qwen3" else transformers.LlamaConfig
    config = kind(**SHAPES[arguments.shape], tie_word_embeddings=True, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return used_fast(model.eval().requires_grad_(False))


def used_fast(model: PreTrainedModel) -> PreTrainedModel:
    """These architectures are known to take the fast pass."""
    use(model, FAST)
    return model


def prompts(rows: int) -> list[list[int]]:
    """Random tokens, sorted by length as a teacher's are."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(24, LONGEST + 1, (rows,), generator=draw).sort().values.tolist()
    return [torch.randint(1, 500, (length,), generator=draw).tolist() for length in lengths]


def sampling(tokens: int, ends: Sequence[int] = ()) -> Sampling:
    """Every token is drawn."""
    return Sampling(tokens, 0, 1.0, tuple(ends))


def ours(model: PreTrainedModel, rows: int, compiled: bool, arguments: argparse.Namespace, texts: int = 1) -> Batch:
    """A batch of the loop of this package, by its seed."""
    asked = prompts(texts * rows)
    ends = range(0, model.config.vocab_size, round(1 / arguments.ending)) if arguments.ending else ()
    writer = Writer(model, sampling(arguments.tokens, ends), rows, LONGEST, compiled)
    return lambda seed: sum(map(len, answers(writer(asked, seed, lambda amount=1, note="": None), tuple(ends))))


def theirs(model: PreTrainedModel, rows: int, tokens: int) -> Batch:
    """A batch of `generate`: padded on the left, a cache that grows, `torch.multinomial`."""
    asked = prompts(rows)
    width = max(map(len, asked))
    ids, seen = (
        torch.tensor(made, device=model.device)
        for made in (
            [[0] * (width - len(prompt)) + prompt for prompt in asked],
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked],
        )
    )
    settings = transformers.GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0, use_cache=True
    )
    return lambda seed: tokens * len(models.generate(model, ids, settings, attention_mask=seen).tolist())


def measure(
    name: str,
    rows: int,
    make: Callable[[], Batch],
    arguments: argparse.Namespace,
    device: torch.device,
    peer: float | None,
) -> float | None:
    """Prints a row and returns its tokens a second; None where memory does not suffice."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        batch = make()
        (first, _), *others = (timed(batch, seed) for seed in range(1 + arguments.repeats))
    except torch.OutOfMemoryError:
        print(f"{name:<30}{rows:>6}   out of memory", flush=True)
        return None
    speed = median(tokens / seconds for seconds, tokens in others)
    ratio = f"{speed / peer:.1f}" if peer else ""
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else ""
    print(f"{name:<30}{rows:>6}{first:>9.2f}{speed:>12,.0f}{ratio:>8}{peak:>9}", flush=True)
    return speed


def timed(batch: Batch, seed: int) -> tuple[float, int]:
    """Seconds of one batch, and its tokens, which are read by the host, so the device is done."""
    began = time.perf_counter()
    tokens = batch(seed)
    return time.perf_counter() - began, tokens


def profile(batch: Batch) -> None:
    """Prints where a batch spends its time, compiled and recorded before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    batch(0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiling(activities=activities) as found:
        batch(1)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90), flush=True)


if __name__ == "__main__":
    main()
