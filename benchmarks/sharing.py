"""Latent weights of a Qwen3's shape learn on one and on several GPUs: speed, memory and losses side by side.

`benchmarks/scale.py --devices 1 2` runs this once for each number of GPUs, as so many processes. Weights are random
bf16 numbers, quantized to the nearest values of grids (2 bits in MLPs, else 4; embedding and head too); everything
learns but norms, from the model that it was, on rows of random tokens. Nothing is read from disk or written to it.
A line has
- `tokens/s` of the median step, the first five left out;
- `held`: what a GPU's tensors take between two steps (of a process without one: its peak), of the one that holds
  most, and `peak`, the most during
  them, with the memory of recorded graphs, which keep it between replays; beside it what a plan expects of it;
- `share`: operations of a token over the product measured in the same process, 6 a weight of decoder layers and head,
  and with the teacher beside it (`full_kl`) 2 more.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from qat import machine as machines
from qat.cache.batch import Batch
from qat.cache.format import encode_ids
from qat.cli import main as command_line
from qat.cli.arguments import parse
from qat.config import LearnConfig, LossKind, ModeConfig, QuantConfig, TrainConfig, WeightConfig, WeightFormat
from qat.distill import optim
from qat.distill.loss import Loss
from qat.distill.optim import Optimizer
from qat.distill.parameters import Learners
from qat.distill.step import Step
from qat.footprint import Job, Shapes
from qat.footprint.training import HELD_OUT, training
from qat.forward import FAST, use
from qat.machine import Machine
from qat.peaks import peaks
from qat.processes import Ranks, joined, place
from qat.quant import latent
from qat.quant.architectures import Layer, select
from qat.quant.embedding import empty, put
from qat.quant.linear import Quantized
from qat.quant.places import matrix

TOP_K, BATCHES = 64, 4  # tokens that the teacher's targets tell of; different batches, which take turns
AT_ONCE = 1 << 26  # weights that are quantized at a time
WARM_UP = 5  # steps that no time is taken of
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Qwen3 by its sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool
    head: int = 128
    vocabulary: int = 151_936

    @property
    def decoder(self) -> int:
        """Weights of the matrices of all decoder layers."""
        attention = 2 * self.head * (self.heads + self.key_heads)
        return self.layers * self.hidden * (attention + 3 * self.inner)

    def config(self) -> Qwen3Config:
        """As transformers describes it."""
        return Qwen3Config(
            architectures=["Qwen3ForCausalLM"], vocab_size=self.vocabulary, hidden_size=self.hidden,
            intermediate_size=self.inner, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads, head_dim=self.head, tie_word_embeddings=self.tied,
            max_position_embeddings=40_960, rms_norm_eps=1e-6, dtype="bfloat16", bos_token_id=256, eos_token_id=257,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained: `rows` of `length` tokens a step, `micro_batch` of them at once."""

    shape: Shape
    length: int
    rows: int
    micro_batch: int
    steps: int
    loss: str
    checkpointing: bool = False
    latent: bool = True  # latent weights learn, not tables and scales alone


def main() -> None:
    """One process of a case: the first prints its figures as a line of JSON."""
    given = json.loads(sys.argv[1])
    case = Case(**given | {"shape": Shape(**given["shape"])})
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place().local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with joined(device) as ranks:
        dtype = torch.bfloat16 if machines.computes_bf16(device) else torch.float32
        machine = Machine(device, dtype, case.micro_batch, compile=cuda, checkpointing=case.checkpointing or None)
        found = measure(case, machine, ranks)
        if ranks.first:
            print(json.dumps(found), flush=True)


def measure(case: Case, machine: Machine, ranks: Ranks) -> dict[str, Any]:
    """Speed, memory and losses of a case."""
    began = time.monotonic()
    peaks.begin(machine.device)
    flops = machines.matmul_flops(machine, 8192 if machine.device.type == "cuda" else 512)
    train = TrainConfig(steps=case.steps, batch_size=case.rows, learn=LearnConfig(latent=float(case.latent)))
    kind = LossKind[case.loss]
    teacher = model(case, machine)
    batches = [batch(case, teacher, seed, machine, ranks) for seed in range(BATCHES)]
    loss = Loss(kind, 1.0, teacher=teacher if kind.needs_teacher else None)
    student = model(case, machine) if kind.needs_teacher else teacher
    layers = chosen(student)
    learners = Learners(student, quantize(student, layers, case.latent), train.learn, machine, train.snap_fp16, ranks)
    step = Step(student, learners, Optimizer(learners.own, train, machine.device), loss, train, machine, ranks)
    begin = time.monotonic() - began
    losses, times = [], []
    with peaks.phase("steps"):
        for number in range(case.steps):
            start = time.perf_counter()
            figures = step([batches[number % BATCHES]], optim.factor(number, train))  # waits for the device
            times.append(time.perf_counter() - start)
            losses.append(figures.loss)
    peak = peaks.found["steps"].device
    held = torch.cuda.memory_allocated(machine.device) if machine.device.type == "cuda" else peak
    seconds = statistics.median(times[WARM_UP:] or times)
    speed = case.rows * case.length / seconds
    weights = case.shape.decoder + case.shape.vocabulary * case.shape.hidden
    operations = (8 if kind.needs_teacher else 6) * weights
    return {
        "devices": ranks.count,
        "of": counted(ranks.count),
        "tokens_per_second": round(speed, 1),
        "share": round(operations * speed / flops / ranks.count, 3),
        "product_tflops": round(flops / 1e12, 1),
        "held_gb": round(ranks.most(held, machine.device) / GB, 2),
        "peak_gb": round(ranks.most(peak, machine.device) / GB, 2),
        "expected_gb": round(expected(case, layers, train, machine, ranks) / GB, 2),
        "micro_batch": step.machine.micro_batch,  # smaller than asked for if memory ran out
        "checkpointing": bool(step.machine.checkpointing),
        "begin_s": round(begin, 1),
        "first_s": round(times[0], 1),
        "step_s": round(seconds, 4),
        "losses": losses,
    }


def expected(case: Case, layers: list[Layer], train: TrainConfig, machine: Machine, ranks: Ranks) -> float:
    """Bytes that a run which trains so would be expected to take of a GPU, or of a process, for its steps."""
    words = [f"loss={case.loss}", f"cache.length={case.length}", f"cache.top_k={TOP_K}", "cache.packing=rows"]
    config = command_line.check(parse(words)).configs[0]
    config.instance.devices = ranks.count
    with torch.device("meta"):
        made = Qwen3ForCausalLM(case.shape.config())
    job = Job(layers, ModeConfig("e2e", True, True, embed=True), train)
    parts = next(training(job, config, Shapes.of(made, made.config), machine))
    measured = [part for part in parts if part.what != HELD_OUT and not (part.host and machine.device.type == "cuda")]
    return sum(part.bytes for part in measured)


def model(case: Case, machine: Machine) -> PreTrainedModel:
    """The shape with random weights, the same in every process."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    try:
        with torch.device(machine.device):
            made = Qwen3ForCausalLM(case.shape.config())
    finally:
        torch.set_default_dtype(before)
    use(made, FAST)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def quantize(made: PreTrainedModel, layers: list[Layer], learning: bool) -> dict[str, Quantized]:
    """Puts quantized layers, perhaps with latent weights without curvature, in place of the model's own; by name."""
    return {layer.name: _quantized(made, layer, learning) for layer in layers}


def chosen(made: PreTrainedModel) -> list[Layer]:
    """The layers that are quantized, and how."""
    mlp, other = (WeightConfig(bits=bits, format=WeightFormat.grid, group=32) for bits in (2, 4))
    tied = made.config.tie_word_embeddings
    return select(made, QuantConfig(name="random", mlp=mlp, attn=other, embed=other, head=None if tied else other))


def _quantized(made: PreTrainedModel, layer: Layer, learning: bool) -> Quantized:
    weight = matrix(made, layer.name)
    with torch.device(weight.device):
        module = empty(layer).requires_grad_(False)
        if learning:
            module.latent = nn.Parameter(torch.empty(layer.shape, dtype=torch.float32), requires_grad=False)
            module.curvature = tuple(torch.zeros(size, dtype=torch.float32) for size in layer.shape)  # type: ignore[assignment]
        even = torch.ones(1, layer.shape[1], dtype=torch.float32)
    for rows in torch.arange(layer.shape[0]).split(max(1, AT_ONCE // layer.shape[1])):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        fitted = layer.format.start(weight[None, part].float(), even, _refused)
        module.indices[part] = fitted.index_NOI[0]
        for name, value in layer.format.stored(fitted.operands).items():
            module.get_parameter(name)[part] = value[0]
    if module.latent is not None:
        module.latent.copy_(latent.between(module, weight))
    put(made, layer.name, module)
    return module


def _refused(*_: Any) -> Tensor:
    raise NotImplementedError("grids need no clusters")


@torch.no_grad()
def batch(case: Case, teacher: PreTrainedModel, seed: int, machine: Machine, ranks: Ranks) -> Batch:
    """This process' rows of a batch of random tokens, with what the teacher says of them."""
    draw, vocabulary = torch.Generator().manual_seed(seed), case.shape.vocabulary
    ids = ranks.own(torch.randint(vocabulary, (case.rows, case.length), generator=draw))
    tops = [_top(teacher, rows.to(machine.device)) for rows in ids.split(max(1, 1024 // case.length))]
    logprobs, top = (torch.cat(parts) for parts in zip(*tops, strict=True))
    stored = {
        "input_ids": ids,
        "loss_mask": torch.ones(len(ids), case.length - 1, dtype=torch.uint8),
        "topk_logprobs": logprobs.half(),
        **encode_ids(top, vocabulary),
    }
    if machine.device.type == "cuda":
        stored = {name: tensor.pin_memory() for name, tensor in stored.items()}
    return Batch(stored, vocabulary, False)


def _top(teacher: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The largest log-probabilities [B, L-1, K] and their tokens, in host memory."""
    logits = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()
    values, tokens = logits.topk(min(TOP_K, logits.shape[-1] - 1))
    return (values - logits.logsumexp(-1, keepdim=True)).cpu(), tokens.cpu()


def compared(lines: list[dict[str, Any]], case: Case) -> str:
    """The lines of a case as a table, beside the first; then the losses, step by step."""
    first, said = lines[0], []
    for line in lines:
        speed, held, peak = (line[name] / first[name] for name in ("tokens_per_second", "held_gb", "peak_gb"))
        apart = _apart(first["losses"], line["losses"])
        said.append(
            f"{line['of']}  {line['tokens_per_second']:9,.0f} tokens/s ({speed:.2f} x)  share"
            f" {line['share']:.1%}  held {line['held_gb']:6.2f} GB ({held:.2f} x)  peak {line['peak_gb']:6.2f} GB"
            f" ({peak:.2f} x, {line['expected_gb']:.2f} expected)"
            f"  micro-batch {line['micro_batch']}  loss {line['losses'][-1]:.5f}, apart {apart:.1e}"
        )
    counts = " ".join(f"{line['devices']:>10}" for line in lines)
    said.append(f"loss of step  {counts}")
    for number, losses in enumerate(zip(*(line["losses"] for line in lines), strict=True), start=1):
        said.append(f"{number:12}  " + " ".join(f"{loss:10.6f}" for loss in losses))
    title = f"{case.shape.layers} layers of {case.shape.hidden}, {case.rows} rows of {case.length}, {case.loss}"
    return "\n".join([title, *said])


def counted(devices: int) -> str:
    """`1 GPU`, `2 GPUs`, and `2 processes` where there is no GPU."""
    one, several = ("GPU", "GPUs") if torch.cuda.is_available() else ("process", "processes")
    return f"{devices} {one if devices == 1 else several}"


def _apart(some: list[float], others: list[float]) -> float:
    """The largest relative distance of two lists of losses."""
    pairs = zip(some, others, strict=True)
    return max((abs(a - b) / abs(a) if a else math.inf for a, b in pairs), default=math.nan)


def arguments(case: Case) -> str:
    """A case as `main` reads it."""
    return json.dumps(asdict(case))


if __name__ == "__main__":
    main()
