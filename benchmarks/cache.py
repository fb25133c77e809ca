"""How fast teacher outputs are recorded and read, beside what bounds each.

    python benchmarks/cache.py --model <Hugging Face folder>     on this computer, with its weights
    python benchmarks/cache.py --shape qwen3                     Qwen3-0.6B's shape, random weights, as on a GPU

1. *Writer*: tokens a second of the bare forward pass (body and head, nothing kept) and of recording (body,
   head, top-k, copy, file), turn by turn in one process, so that both see the same machine. `--profile` adds
   where the time of recording goes.
2. *Loader*: cached positions a second, in training order, from a warm page cache into (pinned) memory.
3. *Memory*: how much a process grows while it reads `--gigabytes` of cache in training order.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qat.artifacts import Artifact
from qat.cache import writer
from qat.cache.format import FORMAT_VERSION, SHARD_ROWS, bytes_a_row, layout, shard_name
from qat.cache.reader import CacheReader
from qat.cache.shards import DTYPES
from qat.data.packing import Rows
from qat.forward import FAST, prepare, use

QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """What is measured: rows of `length` tokens, `rows` of them at once, and what is kept of each position."""

    length: int
    top_k: int
    random: int
    rows: int
    repeats: int

    def meta(self, vocab_size: int, sequences: int) -> dict:
        """What a cache of this case says of itself."""
        return {
            "kind": "caches",
            "format": FORMAT_VERSION,
            "key": "benchmark",
            "length": self.length,
            "top_k": self.top_k,
            "random": self.random,
            "vocab_size": vocab_size,
            "packing": "joined",
            "tail": "exact",
            "seed": 0,
            "shard_rows": SHARD_ROWS,
            "sequences": {"train": sequences},
        }


def main() -> None:
    """Measures what the arguments ask for and prints it."""
    arguments = parse()
    case = Case(arguments.length, arguments.top_k, arguments.random, arguments.rows, arguments.repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}; L{case.length} K{case.top_k} R{case.random}, {case.rows} rows at once")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        vocab_size = QWEN3["vocab_size"]
        if arguments.model or arguments.shape:
            model = teacher(arguments.model, device)
            vocab_size = int(model.config.vocab_size)
            measure_writer(model, case, Path(folder), arguments.profile)
            del model
        if arguments.gigabytes:
            measure_reader(case, vocab_size, arguments.gigabytes, device, Path(folder))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--shape", choices=["qwen3"], help="random weights of this shape")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--random", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="sequences computed at once (instance.micro_batch)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, of which the median is told")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="cache to read; 0 leaves that out")
    parser.add_argument("--folder", help="where the files go; the default is the temporary folder")
    parser.add_argument("--profile", action="store_true", help="where the time of recording goes")
    return parser.parse_args()


def teacher(folder: str | None, device: torch.device) -> PreTrainedModel:
    """The model in bf16, from a folder or with random weights."""
    if folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, trust_remote_code=False
        )
    else:
        torch.manual_seed(0)
        shape = transformers.Qwen3Config(**QWEN3)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                shape, dtype=torch.bfloat16, trust_remote_code=False
            )
    use(model, FAST)
    prepare(model, device.type == "cuda")
    return model.to(device).eval().requires_grad_(False)


def measure_writer(model: PreTrainedModel, case: Case, folder: Path, profile: bool) -> None:
    """Bare forward pass and recording, in turn."""
    on_gpu = model.device.type == "cuda"
    rows = SHARD_ROWS if on_gpu else 4 * case.rows
    shards = [text(model.config.vocab_size, rows, case.length, number) for number in range(8 if on_gpu else 2)]
    meta = case.meta(int(model.config.vocab_size), rows)
    tokens = sum(shard.rows.input_ids.numel() for shard in shards)
    speeds: dict[str, list[float]] = {"bare": [], "recording": []}
    for turn in range(case.repeats + 1):
        for name, work in (
            ("bare", lambda: bare(model, shards, case.rows)),
            ("recording", lambda: record(model, shards, meta, case.rows, folder)),
        ):
            seconds = timed(work, on_gpu)
            if turn:  # the first is to warm up
                speeds[name].append(tokens / seconds)
    ratios = [r / b for b, r in zip(speeds["bare"], speeds["recording"], strict=True)]
    print(f"bare forward {median(speeds['bare']):,.0f} tokens/s, recording {median(speeds['recording']):,.0f}")
    print(f"recording at {median(ratios):.1%} of the bare forward ({min(ratios):.1%} to {max(ratios):.1%})")
    if profile:
        show_profile(lambda: record(model, shards, meta, case.rows, folder), on_gpu)


def text(vocab_size: int, rows: int, length: int, number: int) -> writer.Shard:
    """Random tokens, with a document boundary in every other row."""
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(number)).int()
    starts = torch.zeros(rows, length, dtype=torch.uint8)
    starts[:, 0] = 1
    starts[::2, length // 2] = 1
    return writer.Shard("train", number, Rows(ids, starts, 1 - starts[:, 1:], torch.zeros_like(starts[:, 1:])))


@torch.inference_mode()
def bare(model: PreTrainedModel, shards: list[writer.Shard], rows: int) -> None:
    """Logits of everything, looked at by nobody."""
    for shard in shards:
        for ids in shard.rows.input_ids.split(rows):
            model(ids.to(model.device).long())


def record(model: PreTrainedModel, shards: list[writer.Shard], meta: dict, rows: int, folder: Path) -> None:
    """What `writer` does for a cache, the copy and the file in a thread beside it."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for shard in shards:
            kept = writer.record(model, shard, meta, rows, lambda amount=1, note="": None)
            if before:
                before.result()
            before = thread.submit(writer._write, shard, kept, meta["vocab_size"], meta["key"], folder)
        before.result()


def show_profile(work: Callable[[], None], on_gpu: bool) -> None:
    """The ten operations that take most of the time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60))


def measure_reader(case: Case, vocab_size: int, gigabytes: float, device: torch.device, folder: Path) -> None:
    """Positions a second and growth of the process."""
    meta = case.meta(vocab_size, 0)
    count = max(1, round(gigabytes * 1e9 / (bytes_a_row(meta, "train") * SHARD_ROWS)))
    meta = case.meta(vocab_size, count * SHARD_ROWS)
    shapes = layout(meta, "train")
    whole = {name: torch.zeros([SHARD_ROWS, *shape], dtype=DTYPES[kind]) for name, (kind, shape) in shapes.items()}
    for index in range(count):
        name = shard_name("train", index)
        save_file(whole, folder / name, metadata={"shard": f"{meta['key']}/{name}"})
    del whole
    read = sum(path.stat().st_size for path in folder.glob("train-*"))
    reader = CacheReader(Artifact(folder, meta), "train")
    batch = 504
    next(iter(reader.stream([torch.arange(batch)], device)))
    before = peak = resident()
    speeds = []
    for turn in range(case.repeats + 1):
        steps = range(turn * (reader.rows // batch), (turn + 1) * (reader.rows // batch))
        began = time.perf_counter()
        for _ in reader.stream((reader.training_rows(step, batch, 0) for step in steps), device):
            peak = max(peak, resident())
        if turn:
            speeds.append(len(steps) * batch * (case.length - 1) / (time.perf_counter() - began))
    pinned = "pinned " if device.type == "cuda" else ""
    print(f"loader into {pinned}memory, one thread: {median(speeds):,.0f} positions/s from {read / 1e9:.1f} GB")
    print(f"the process grew by {(peak - before) / 1e6:.0f} MB meanwhile, pinned batches included")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(work: Callable[[], None], on_gpu: bool) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
