"""How fast files write greedy tokens on a processor: by turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import qat  # noqa: F401 - registers packed exports
from qat.export.gguf import FILE
from qat.models import ModelFolder

PROMPT = "The capital of France is"
WRITTEN, TURNS = 64, 6

Run = Callable[[], object]  # writes `WRITTEN` tokens after the prompt, greedily, whatever ends a text


def measure(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """Tokens a second of each, and how many times as fast as each of the others, turn by turn.

    Args:
        runs: by name; the first turn warms up and does not count.

    Returns:
        By name `tokens_per_second`, and `ratios` by the others' names; medians over the turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "tokens_per_second": round(WRITTEN / statistics.median(own), 1),
            "ratios": {
                other: round(statistics.median(b / a for a, b in zip(own, theirs, strict=True)), 3)
                for other, theirs in seconds.items()
                if other != name
            },
        }
        for name, own in seconds.items()
    }


def gguf(folder: Path, threads: int) -> Run:
    """llama.cpp with its own settings for a processor."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = str(folder / FILE), 256, 1, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    asked.verbosity = -1
    server = xllamacpp.Server(asked)
    prompt = {"prompt": PROMPT, "n_predict": WRITTEN, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    return lambda: server.handle_completions(prompt)


def mlx(folder: Path, threads: int) -> Run:
    """mlx-lm in fp32: on processors it computes fp16 some fifty times more slowly. It has no say in threads."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    prompt = mx.array(tokenizer.encode(PROMPT))
    return lambda: list(generate_step(prompt, model, max_tokens=WRITTEN))


def packed(folder: Path, threads: int) -> Run:
    """Our packed form by transformers."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    ids = torch.tensor([ModelFolder("packed", folder, "").tokenizer().encode(PROMPT)])
    settings = GenerationConfig(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
    return torch.inference_mode()(lambda: model.generate(ids, generation_config=settings))


BY_EXPORT: dict[str, Callable[[Path, int], Run]] = {"gguf": gguf, "mlx": mlx}
