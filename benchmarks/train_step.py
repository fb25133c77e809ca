"""What a training step costs: the engine beside the rank-by-rank form it replaces and the machine's own limit.

    python benchmarks/train_step.py                                 # every row, Qwen3-0.6B shape
    python benchmarks/train_step.py --rows e2e mlp --seconds 20     # some rows
    python benchmarks/train_step.py --rows e2e --profile            # and where the time goes
    python benchmarks/train_step.py --model smollm2 --rows rank_4 e2e_4 --device cpu
    python benchmarks/train_step.py --quant g2a4_g64                # another option of conf/quant/
    python benchmarks/train_step.py --rows record --length 128 --teacher qwen3_1_7b   # a larger model teaches
    python benchmarks/train_step.py --rows record --length 128 1024 2048 --document 700   # long rows
    torchrun --nproc-per-node 2 benchmarks/train_step.py --rows e2e_1008
    python benchmarks/train_step.py --tiny                          # does it work at all, on any machine

Weights, values, scales and cached targets are random: nothing is read from disk. `share` is tokens/s · 6 · N over the
product of the same type measured in the same process, N being the quantized weights; `first` the seconds of
the first step, compilation included.
"""

import argparse
import gc
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from qat import machine as machines
from qat.cache.batch import Batch
from qat.cache.format import encode_ids
from qat.config import LearnConfig, LossKind, QuantConfig, TrainConfig
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.distill.optim import Optimizer
from qat.distill.parameters import Learners
from qat.distill.step import Step
from qat.forward import FAST, prepare, use
from qat.machine import Machine
from qat.peaks import peaks
from qat.processes import Ranks, joined, place
from qat.quant.architectures import Layer, select
from qat.quant.embedding import empty, put
from qat.quant.formats import Codebook
from qat.quant.linear import Quantized
from qat.quant.lookup import look_up

LENGTH, TOP_K = 64, 64
# Hidden size, inside of MLPs, layers, query heads, key heads, from the models' config.json files on the hub
SHAPES = {
    "qwen3": (1024, 3072, 28, 16, 8),  # Qwen/Qwen3-0.6B
    "qwen3_1_7b": (2048, 6144, 28, 16, 8),
    "qwen3_4b": (2560, 9728, 36, 32, 8),
    "qwen3_8b": (4096, 12288, 36, 32, 8),
    "smollm2": (576, 1536, 30, 9, 3),  # HuggingFaceTB/SmolLM2-135M
    "smollm2_360m": (960, 2560, 32, 15, 5),
}
OPTIONS = Path(__file__).resolve().parents[1] / "conf" / "quant"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    batch: int
    mode: str = "e2e"
    loss: LossKind = LossKind.topk_kl
    learn: LearnConfig = field(default_factory=LearnConfig)
    compile: bool = True
    graphs: bool = True
    checkpointing: bool = False
    micro_batch: int = 4096
    dtype: torch.dtype | None = None
    steps: int | None = None  # so many in all, the first included, instead of some seconds of them


LATENT = LearnConfig(latent=1.0)
ROWS: dict[str, Row] = {
    "e2e": Row(504),
    "e2e_eager": Row(504, compile=False),
    "mlp": Row(504, "mlp"),
    "latent": Row(504, learn=LATENT),
    "bucket": Row(504, loss=LossKind.bucket_kl),
    "full": Row(504, loss=LossKind.full_kl),
    "record": Row(128, loss=LossKind.full_kl, learn=LATENT),  # with --length 128
    "checkpointed": Row(504, checkpointing=True),
    "accumulated": Row(504, micro_batch=126),
    "e2e_4": Row(4),
    "e2e_8": Row(8),
    "mlp_4": Row(4, "mlp"),
    "latent_8": Row(8, learn=LATENT),
    "bucket_8": Row(8, loss=LossKind.bucket_kl),
    "full_8": Row(8, loss=LossKind.full_kl),
    "e2e_8_launched": Row(8, graphs=False),
    "e2e_8_eager": Row(8, compile=False, graphs=False),
    "e2e_8_eager_graphs": Row(8, compile=False),
    "fp16": Row(504, dtype=torch.float16),
    "fp32_8": Row(8, dtype=torch.float32),
    "sr_002": Row(4, "mlp", steps=4000),
    "e2e_1008": Row(1008),
    "rank_8": Row(8, compile=False, checkpointing=True),
    "rank_4": Row(4, compile=False, checkpointing=True),
    "rank": Row(504, compile=False, checkpointing=True),
}
USUAL = [name for name in ROWS if name not in ("full", "record", "full_8", "fp16", "fp32_8", "e2e_1008", "rank_4")]


class RankByRank(nn.Module):
    """`y = Σ_r g_r·a_r ⊙ (Q @ (b_r ⊙ x))`: R products where one would do; the codebook stays as it is."""

    def __init__(self, layer: Quantized, dtype: torch.dtype, learns: bool) -> None:
        super().__init__()
        codebook, *scales = layer.parts().values()
        self.values = look_up(codebook, layer.indices).to(dtype)
        self.A, self.B, self.g = (nn.Parameter(value.detach().clone(), learns) for value in scales)

    def forward(self, x: Tensor) -> Tensor:
        A, B = (self.A * self.g).to(x.dtype), self.B.to(x.dtype)
        return sum(  # type: ignore[return-value]
            A[:, r] * nn.functional.linear(x * B[r], self.values) for r in range(len(self.g))
        )


class Reporter:
    """Prints a row as soon as it is measured."""

    HEADER = ("row", "batch", "ms/step", "tokens/s", "share", "peak GB", "first s", "loss", "")

    def __init__(self, json_path: str | None, speaks: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.json_path, self.speaks = json_path, speaks
        self.say("{:20} {:>6} {:>9} {:>10} {:>7} {:>8} {:>8} {:>8} {}".format(*self.HEADER))

    def say(self, text: str) -> None:
        """One line, at once, from one process."""
        if self.speaks:
            print(text, flush=True)

    def add(self, name: str, batch: int, figures: dict[str, float], note: str = "") -> None:
        """One row."""
        f = figures
        self.say(
            f"{name:20} {batch:6} {f['ms']:9.2f} {f['tokens_per_second']:10,.0f} {f['share']:7.1%}"
            f" {f['peak_gb']:8.2f} {f['first_s']:8.1f} {f['loss']:8.4f} {note}"
        )
        self.rows.append({"row": name, "batch": batch, **figures, "note": note})
        if self.json_path and self.speaks:
            with open(self.json_path, "w") as file:
                json.dump(self.rows, file, indent=1)


def main() -> None:
    """Measures the rows asked for, one after the other."""
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", place().local)
        torch.cuda.set_device(device)
        if options.memory_fraction < 1:
            torch.cuda.set_per_process_memory_fraction(options.memory_fraction, device)
    with joined(device) as ranks:
        dtype = torch.bfloat16 if machines.computes_bf16(device) else torch.float32
        machine = Machine(device, dtype, 4096)
        flops = machines.matmul_flops(machine, 512 if options.tiny else 8192 if device.type == "cuda" else 2048)
        reporter = Reporter(options.json, ranks.first)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        reporter.say(
            f"{name}, torch {torch.__version__}, {ranks.count} process(es), product {flops / 1e12:.2f} TFLOP/s"
        )
        for length in options.lengths:
            options.length = length
            for row in options.rows:
                attempt(row, options, machine, flops, ranks, reporter)
        if options.parts:
            parts(options, machine, reporter)


def attempt(
    name: str, options: argparse.Namespace, machine: Machine, flops: float, ranks: Ranks, reporter: Reporter
) -> None:
    """One row, or why there is none."""
    row = ROWS[name]
    if options.tiny:
        row = replace(row, batch=min(row.batch, 6), steps=row.steps and 4, compile=row.compile and options.compile)
    row = replace(row, batch=options.batch or row.batch, compile=row.compile and options.compile)
    row = replace(row, micro_batch=options.micro_batch or row.micro_batch)
    row = replace(row, batch=max(1, row.batch * options.lengths[0] // options.length))
    started = time.monotonic()
    try:
        figures = measure(row, name.startswith("rank"), options, machine, flops, ranks)
        reporter.add(name, row.batch, figures, f"rows of {options.length}")
    except Exception as error:  # the other rows are still worth having
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reporter.say(f"{name:20} {row.batch:6} failed after {time.monotonic() - started:.0f} s: {first[:300]}")
        if options.raise_errors:
            raise
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    row: Row, by_rank: bool, options: argparse.Namespace, machine: Machine, flops: float, ranks: Ranks
) -> dict[str, float]:
    """The figures of one row."""
    machine = replace(
        machine,
        dtype=row.dtype or machine.dtype,
        micro_batch=row.micro_batch,
        compile=row.compile,
        checkpointing=row.checkpointing,
    )
    peaks.begin(machine.device)
    began = time.monotonic()
    student = model(options, machine)
    weights = sum(layer.outputs * layer.inputs for layer in student[1].values())
    train = TrainConfig(batch_size=row.batch, learn=row.learn)
    teacher = teacher_of(options, machine) if row.loss is LossKind.full_kl else None
    loss = Loss(row.loss, 2.0 if row.loss is LossKind.topk_kl else 1.0, teacher=teacher)
    make = rank_by_rank if by_rank else engine
    one = make(*student, row, loss, train, machine, ranks)
    batches = [batch(options, row.batch // ranks.count, seed, ranks) for seed in range(4)]
    with peaks.phase("steps"):
        figures = timed(one, batches, row.steps, options.seconds, machine.device, began)
    if options.profile:
        profile(lambda: one(batches[0]), machine.device)
    speed = row.batch * options.length / (figures["ms"] / 1e3)
    peak = peaks.found["steps"].device / 1e9
    return {**figures, "tokens_per_second": speed, "share": 6 * weights * speed / flops / ranks.count, "peak_gb": peak}


def timed(
    one: Callable[[Batch], float],
    batches: list[Batch],
    steps: int | None,
    seconds: float,
    device: torch.device,
    began: float,
) -> dict[str, float]:
    """Milliseconds of the median step after the first four; all of them, if their number is given."""
    loss = one(batches[0])
    synchronize(device)
    first = time.monotonic() - began
    if steps is not None:
        for step in range(1, steps):
            loss = one(batches[step % len(batches)])
        whole = time.monotonic() - began
        return {"ms": 1e3 * whole / steps, "first_s": first, "loss": loss, "seconds": whole}
    for step in range(1, 4):  # compiled forms of other layers, recordings
        one(batches[step])
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        synchronize(device)
        start = time.perf_counter()
        loss = one(batches[len(times) % len(batches)])
        synchronize(device)
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * sorted(times)[len(times) // 2], "first_s": first, "loss": loss}


def engine(
    student: PreTrainedModel,
    layers: dict[str, Quantized],
    row: Row,
    loss: Loss,
    train: TrainConfig,
    machine: Machine,
    ranks: Ranks,
) -> Callable[[Batch], float]:
    """A step of `qat.distill`."""
    learning = {name: layer for name, layer in layers.items() if row.mode == "e2e" or ".mlp." in name}
    for name, layer in layers.items():
        if name not in learning:
            layer.bake(machine.dtype)
        elif row.learn.latent:
            layer.latent = nn.Parameter(layer.weight(torch.float32), requires_grad=False)
            layer.curvature = tuple(torch.ones(size, device=machine.device) for size in (layer.outputs, layer.inputs))
    learners = Learners(student, learning, train.learn, machine, train.snap_fp16)
    step = Step(student, learners, Optimizer(learners.parameters, train, machine.device), loss, train, machine, ranks)
    if not row.graphs:
        step.recorder.stream = None

    def one(batch: Batch) -> float:
        return step([batch], 1.0).loss

    return one


def rank_by_rank(
    student: PreTrainedModel,
    layers: dict[str, Quantized],
    row: Row,
    loss: Loss,
    train: TrainConfig,
    machine: Machine,
    ranks: Ranks,
) -> Callable[[Batch], float]:
    """The same student in the form that this project replaces, each decoder layer checkpointed; scales learn."""
    for name, layer in layers.items():
        student.set_submodule(name, RankByRank(layer, machine.dtype, learns=True))
    learning = [p for p in student.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learning, lr=1e-4)
    head = Head(student, loss)
    prepare(student, False, row.checkpointing)

    def one(batch: Batch) -> float:
        here = batch.to(machine.device)
        hidden = student.base_model(input_ids=here.input_ids).last_hidden_state[:, :-1].flatten(0, 1)
        ids, logprobs = here.topk_ids.flatten(0, 1), here.topk_logprobs.flatten(0, 1)
        weight = torch.full((len(hidden),), 1 / len(hidden), device=machine.device)
        value, grad = head.backward(hidden.detach(), ids, logprobs, weight, None)
        hidden.backward(grad)
        nn.utils.clip_grad_norm_(learning, 1.0)
        adam.step()
        adam.zero_grad()
        return float(value)

    return one


def parts(options: argparse.Namespace, machine: Machine, reporter: Reporter) -> None:
    """Times of a step's parts by themselves: what is left is the decoder layers."""
    student, layers = model(options, machine)
    train = TrainConfig()
    learners = Learners(student, layers, train.learn, machine, False)
    optimizer = Optimizer(learners.parameters, train, machine.device)
    learners.begin(1)
    learners.write()
    learners._weights.sums.normal_()  # type: ignore[union-attr]
    positions = 126 if options.tiny else 504 * (LENGTH - 1)
    draw = batch(options, positions // (options.length - 1), 0, Ranks()).to(machine.device)
    ids, logprobs = draw.topk_ids.flatten(0, 1), draw.topk_logprobs.flatten(0, 1)
    hidden = torch.randn(len(ids), student.config.hidden_size, device=machine.device).to(machine.dtype)
    weight = torch.full((len(ids),), 1 / len(ids), device=machine.device)
    one, zero = torch.ones((), device=machine.device), torch.zeros((), device=machine.device)
    pieces: dict[str, Callable[[], Any]] = {
        "write": learners.write,
        "reduce": learners.reduce,
        "norm": lambda: nn.utils.get_total_norm(learners.grads()),
        "update": lambda: optimizer.step(one, zero),
    }
    for kind in (LossKind.topk_kl, LossKind.bucket_kl):
        head = Head(student, Loss(kind, 1.0))
        pieces[f"head {kind.name}"] = lambda head=head: head.backward(hidden, ids, logprobs, weight, None)
    for name, piece in pieces.items():
        for _ in range(2):
            piece()
        times = []
        for _ in range(5):
            synchronize(machine.device)
            start = time.perf_counter()
            piece()
            synchronize(machine.device)
            times.append(time.perf_counter() - start)
        reporter.say(f"part {name:20} {1e3 * sorted(times)[2]:9.3f} ms")


def model(options: argparse.Namespace, machine: Machine) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    """A random model of the asked shape, its linear layers quantized with random values and scales."""
    made = random_model(options.model, options.tiny, machine)
    settings = OmegaConf.merge(OmegaConf.structured(QuantConfig), OmegaConf.load(OPTIONS / f"{options.quant}.yaml"))
    layers: dict[str, Quantized] = {}
    for layer in select(made, cast(QuantConfig, OmegaConf.to_object(settings))):
        layers[layer.name] = random_layer(layer, machine.device)
        put(made, layer.name, layers[layer.name])
    return made, layers


def teacher_of(options: argparse.Namespace, machine: Machine) -> PreTrainedModel:
    """What runs beside the student: a dense random model, of the shape asked for or else of the student's."""
    if options.teacher is None:
        return random_model(options.model, options.tiny, machine)
    if vocabulary(options.teacher) != vocabulary(options.model):
        raise SystemExit(f"--teacher {options.teacher} has another vocabulary than --model {options.model}")
    return random_model(options.teacher, options.tiny, machine, times=2)


def random_model(name: str, tiny: bool, machine: Machine, times: int = 1) -> PreTrainedModel:
    """A model of a shape with random weights; a tiny one is `times` as wide."""
    torch.manual_seed(0)
    with torch.device(machine.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(machine.dtype)
        made = shape(name, tiny, times)
        torch.set_default_dtype(before)
    use(made, FAST)
    made.eval().requires_grad_(False)
    return made


def shape(name: str, tiny: bool, times: int) -> PreTrainedModel:
    """The architecture, with random weights."""
    if tiny:
        sizes = {"vocab_size": 640, "hidden_size": 64 * times, "intermediate_size": 128, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))
    hidden, inner, depth, queries, keys = SHAPES[name]
    sizes = {"vocab_size": vocabulary(name), "hidden_size": hidden, "intermediate_size": inner}
    heads = {"num_hidden_layers": depth, "num_attention_heads": queries, "num_key_value_heads": keys}
    if name.startswith("smollm2"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    more = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **more, tie_word_embeddings=name != "qwen3_8b"))


def vocabulary(name: str) -> int:
    """Tokens of a family."""
    return 49152 if name.startswith("smollm2") else 151936


def random_layer(of: Layer, device: torch.device) -> Quantized:
    """Random indices, even values, scales that give about the size of a trained weight."""
    layer, format, (outputs, inputs) = empty(of).to(device).requires_grad_(False), of.format, of.shape
    layer.indices.random_(0, 2 ** format.indices(outputs, inputs).bits)
    if not isinstance(format, Codebook):
        layer.set_parts({name: part.normal_(std=0.02) for name, part in layer.parts().items()})
        return layer
    codebook, A, B, magnitudes = layer.parts().values()
    codebook.copy_(torch.linspace(-1, 1, 2**format.bits))
    A.normal_(std=1 / math.sqrt(outputs))
    B.normal_(std=1 / math.sqrt(inputs))
    magnitudes.fill_(math.sqrt(outputs / format.rank))
    return layer


def batch(options: argparse.Namespace, rows: int, seed: int, ranks: Ranks) -> Batch:
    """Random tokens and targets, as the cache would give them: for a GPU in pinned memory."""
    draw = torch.Generator().manual_seed(seed * ranks.count + ranks.rank)
    tokens = 640 if options.tiny else vocabulary(options.model)
    ids = torch.randint(tokens, (rows, options.length), generator=draw)
    top = torch.randint(tokens - TOP_K, (rows, options.length - 1, 1), generator=draw) + torch.arange(TOP_K)
    logits = torch.randn(top.shape, generator=draw).mul_(3).sort(-1, descending=True).values
    starts = (torch.arange(options.length) % (options.document or options.length) == 0).to(torch.uint8)
    stored = {
        "input_ids": ids,
        "document_starts": starts.repeat(rows, 1),
        "loss_mask": torch.ones(rows, options.length - 1, dtype=torch.uint8),
        "topk_logprobs": (logits.log_softmax(-1) - 0.05).half(),
        **encode_ids(top, tokens),
    }
    if options.device == "cuda":
        stored = {name: tensor.pin_memory() for name, tensor in stored.items()}
    return Batch(stored, tokens, options.document is not None)


def profile(one: Callable[[], Any], device: torch.device) -> None:
    """The costliest kernels of one step."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        one()
        synchronize(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90), flush=True)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=USUAL, choices=ROWS, metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--model", choices=SHAPES, default="qwen3")
    parser.add_argument("--teacher", choices=SHAPES, help="of rows with full KL: another shape, dense")
    parser.add_argument("--quant", default="q2a4", help="an option of conf/quant/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measured steps a row")
    parser.add_argument("--length", dest="lengths", nargs="+", type=int, default=[LENGTH], help="one after the other")
    parser.add_argument("--batch", type=int, help="rows of a step, instead of the row's own; fewer of greater length")
    parser.add_argument("--document", type=int, help="tokens of each document where several share a row")
    parser.add_argument("--micro-batch", type=int, help="instead of the row's own")
    parser.add_argument("--memory-fraction", type=float, default=1.0, help="of the GPU's memory, to play a smaller one")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--parts", action="store_true", help="time a step's parts too")
    parser.add_argument("--profile", action="store_true", help="list the costliest kernels of each row")
    parser.add_argument("--tiny", action="store_true", help="a three-layer model, batches of at most 6")
    parser.add_argument("--raise-errors", action="store_true")
    parser.add_argument("--json", help="write the rows there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
