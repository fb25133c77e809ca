"""What a tied embedding in few bits costs, converted and trained: codebooks and grids under one curvature.

    python benchmarks/embedding.py fit --model <folder> --cache <cache artifact> --formats t4r16 u4g32 --output <folder>
    python benchmarks/embedding.py train <folder>/t4r16.safetensors stage=distill checkpoint=… +experiment=record_…
    python benchmarks/embedding.py evaluate --model <folder> --evaluation a.json b.txt \
        --students exact=<folder>/t4r16.safetensors trained=<checkpoint>

A format is `t` (a learned codebook with low-rank scales), its bits, `r` and a rank, or `u` (evenly spaced values), its
bits, `g` and a group of columns that share a scale: `t4r16`, `u4g64`. A tied matrix has two jobs, and to second
order an error E in it costs `Σ_v E_v (ρ_v H + φ_v Γ) E_vᵀ`: as the head, H being the second moment of the final
hidden states and ρ_v the mean of p_v (1 − p_v); as the input, Γ being the second moment of the loss's gradient at
the embedded tokens and φ_v how often token v is one. Since ρ and φ are nearly proportional, rows share one matrix.

Trained, the latent weights, scales and codebook learn with those of the decoder under `full_kl`: the head's gradient
comes out of the chunks that the loss is computed in, the input's is added to it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from evaluation import Evaluation, add_arguments, teacher_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import checkpoints, machine
from qat.artifacts import open_artifact
from qat.cache.reader import Batch, CacheReader
from qat.checkpoints import native
from qat.config import InstanceConfig, LearnConfig, ModelConfig, ModelSource
from qat.convert.convert import module
from qat.convert.moments import LOGITS
from qat.distill import head, trainer
from qat.distill.parameters import Learners, Parameter
from qat.machine import Machine, exact_matmul, widened
from qat.models import locate
from qat.quant import kmeans, latent, packing
from qat.quant.architectures import Layer
from qat.quant.curvature import Factor
from qat.quant.fit import Problem, fit
from qat.quant.formats import Codebook, Format, Uniform
from qat.quant.linear import QuantLinear

NAME = "lm_head"
FILE = "embedding.safetensors"
ROUNDS, SWEEPS = 8, 4
CALIBRATION_TOKENS = 65_536


def main() -> None:
    """One of three commands."""
    if sys.argv[1:2] == ["train"]:
        sys.exit(train(Path(sys.argv[2]), sys.argv[3:]))
    options = arguments()
    {"fit": fit_all, "evaluate": evaluate}[options.command](options)


def fit_all(options: argparse.Namespace) -> None:
    """Fits every format and writes a file of each."""
    device = machine.resolve(InstanceConfig(name="auto")).device
    folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
    model = folder.load(torch.float32, device)
    began = time.monotonic()
    with exact_matmul():
        rho, H = curvature(model, calibration(Path(options.cache)))
    print(f"curvature: {time.monotonic() - began:.1f} s", flush=True)
    for name in options.formats:
        began = time.monotonic()
        with torch.no_grad(), exact_matmul():
            made = quantized(model.lm_head.weight.detach(), rho, H, name)
        save(made, name, (rho, H.diagonal()), Path(options.output) / f"{name}.safetensors")
        bits = made.format.stored_bits(*made.indices.shape) / made.indices.numel()
        print(f"{name}: {bits:.3f} bits, {time.monotonic() - began:.1f} s", flush=True)


def calibration(cache: Path) -> list[Batch]:
    """The first training rows of a cache."""
    reader = CacheReader(open_artifact(cache), "train")
    rows = min(reader.rows, CALIBRATION_TOKENS // int(reader.meta["length"]))
    return reader.batch(torch.arange(rows)).split(64)


def curvature(model: PreTrainedModel, text: list[Batch]) -> tuple[Tensor, Tensor]:
    """ρ [V] and the rows' joint matrix H + Γ·Σφ/Σρ [D, D]."""
    W, draw = model.lm_head.weight.detach(), torch.Generator().manual_seed(0)
    rho, count = W.new_zeros(len(W)), 0
    H, gamma = (W.new_zeros(W.shape[1], W.shape[1]) for _ in range(2))
    for batch in text:
        inputs = batch.to(W.device).inputs()
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        with torch.enable_grad():
            states = model.base_model(inputs_embeds=embedded, **inputs).last_hidden_state
        slopes = []
        for hidden in states.detach().flatten(0, 1).split(LOGITS.get(W.device.type, LOGITS["cpu"]) // len(W)):
            p = (hidden @ W.T).softmax(-1)
            rho += (p - p.square()).sum(0)
            u = torch.rand(len(p), 1, generator=draw).to(p)
            token = torch.searchsorted(p.cumsum(-1), u).clamp_max_(len(W) - 1)
            slopes.append(p.scatter_add_(1, token, -torch.ones_like(u)) @ W)
            H += hidden.T @ hidden
        (g,) = torch.autograd.grad(states, embedded, torch.cat(slopes).view_as(states))
        gamma += g.flatten(0, 1).T @ g.flatten(0, 1)
        count += states.shape[0] * states.shape[1]
    rho, H, gamma = rho / count, H / count, gamma / count
    gamma /= rho.sum()
    print(f"of the head {H.trace():.4g}, of the input {gamma.trace():.4g}")
    return rho, H + gamma


def quantized(weight: Tensor, rho: Tensor, H: Tensor, name: str) -> QuantLinear:
    """The matrix in a format."""
    problem = Problem(weight[None], H[None], Factor.of(H[None]))
    rows = (rho / rho.mean()).clamp(1e-3, 1e3).sqrt()
    problem.row_NO, problem.weight_NOI = rows[None], weight[None] * rows[None, :, None]
    format = parse(name)
    made = fit(problem, format, kmeans.kmeans, ROUNDS, SWEEPS)
    return module(Layer(NAME, "head", (weight.shape[0], weight.shape[1]), format), made, 0)


def parse(name: str) -> Format:
    """`t4r16` is a codebook at rank 16, `u4g32` a grid in groups of 32."""
    bits, size = int(name[1]), int(name[3:])
    return Codebook(bits, size) if name[0] == "t" else Uniform(bits, size)


def save(made: QuantLinear, name: str, bends: tuple[Tensor, Tensor], path: Path) -> None:
    """Everything that evaluation and training need."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = made.normalized() | {"indices": packing.pack(made.indices, made.format.bits)}
    tensors |= {"outputs": bends[0], "inputs": bends[1]}
    told = {"name": name, "shape": json.dumps(list(made.indices.shape))}
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path, told)


def load(path: Path, device: torch.device) -> tuple[str, QuantLinear]:
    """The format's name and the matrix."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    tensors = {key: value.to(device) for key, value in load_file(path).items()}
    shape = tuple(json.loads(told["shape"]))
    made = QuantLinear(parse(told["name"]), *shape).to(device)
    made.indices.copy_(packing.unpack(tensors["indices"], made.format.bits, shape))
    made.set_parts({part: tensors[part] for part in made.parts()})
    made.curvature = (tensors["outputs"], tensors["inputs"])
    return told["name"], made.requires_grad_(False)


def train(path: Path, words: list[str]) -> int:
    """A run of `launch.py` in which the embedding of that file learns too."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import launch

    os.environ["QAT_EMBEDDING"] = str(path.resolve())
    write = native.write

    def with_embedding(model: PreTrainedModel, folder: Path) -> None:
        write(model, folder)
        made: QuantLinear = vars(model)["embedding"]
        name, bends = vars(model)["embedding_format"], made.curvature
        save(made, name, (bends[0], bends[1]), folder / FILE)  # type: ignore[index]

    with (
        patch.object(trainer, "Learners", WithEmbedding),
        patch("qat.distill.step.Head", LearningHead),
        patch.object(native, "write", with_embedding),
    ):
        return launch.main.main(words, launch.launch)


class WithEmbedding(Learners):
    """Everything that learns, the tied embedding included."""

    def __init__(
        self, student: nn.Module, layers: dict[str, QuantLinear], learn: LearnConfig, machine: Machine, snap: bool
    ) -> None:
        name, made = load(Path(os.environ["QAT_EMBEDDING"]), machine.device)
        student: Any = student
        exact = student.lm_head.weight.detach().float()
        made.latent = nn.Parameter(latent.between(made, exact), requires_grad=False)
        learn.embedding = float(os.environ.get("QAT_EMBEDDING_RATE", learn.latent))  # type: ignore[attr-defined]
        self.made = made
        super().__init__(student, layers | {NAME: made}, learn, machine, snap)
        vars(student)["embedding"], vars(student)["embedding_format"] = made, name
        weights: Any = self._weights
        student.lm_head.weight = nn.Parameter(weights.value(made), requires_grad=False)
        student.lm_head.sums = lambda: weights.sum(made)
        self.anchor = torch.zeros((), device=machine.device, requires_grad=True)
        student.model.embed_tokens.forward = lambda ids: LookUp.apply(
            self.anchor, ids, student.lm_head.weight, student.lm_head.sums
        )
        self.adding = False
        LearningHead.learner = self

    def begin(self, micro_batches: int) -> None:
        """Sums of one micro-batch are overwritten elsewhere, so the embedding's begin at zero by themselves."""
        super().begin(micro_batches)
        self.adding = micro_batches > 1

    def _of(self, kind: str, layers: dict[str, QuantLinear]) -> list[Parameter]:
        found = list(super()._of(kind, layers))
        own = f"{NAME}.latent"
        return [Parameter(own, "embedding", p.value) if p.name == own else p for p in found]


class LookUp(torch.autograd.Function):
    """Rows of the embedding, whose gradient is added to the weight's sum at once."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, weight: Tensor, sums: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sums = sums
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        ctx.sums().index_add_(0, ids.flatten(), grad.flatten(0, 1).float())
        return None, None, None, None


class LearningHead(head.Head):
    """The head whose own gradient comes out of the chunks of the loss; `full_kl` without a hard term."""

    learner: WithEmbedding

    def backward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """As the frozen head's."""
        if not self.learner.adding:
            self._sums().zero_()
        return super().backward(*inputs)

    def _sums(self) -> Tensor:
        weights: Any = self.learner._weights
        return weights.sum(self.learner.made)

    def _dense(
        self, hidden: Tensor, ids: Tensor, logprobs: Tensor, weight: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if teacher is None or self.loss.hard:
            raise SystemExit("embedding.py: the head learns under loss=full_kl alone")
        value, grad = self._full(self.head.logits(hidden), teacher, weight, hidden.dtype)
        self._sums().add_(widened(grad.T, hidden.T))
        return value, grad @ self.head.weight


def evaluate(options: argparse.Namespace) -> None:
    """KL of students with their embedding written out: a fitted file in the exact teacher, or a trained checkpoint."""
    work, rows = Evaluation(options), []
    for given in options.students:
        name, _, path = given.partition("=")
        student = student_of(work, Path(path))
        row: dict[str, Any] = {"name": name, "path": path}
        for text in work.held_out:
            row[text] = round(work.evaluate(student, text)["kl"], 5)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1))


def student_of(work: Evaluation, path: Path) -> PreTrainedModel:
    """The exact teacher with a fitted embedding, or a checkpoint with its own."""
    judge, device = work.judge, work.machine.device
    if path.is_file():
        model = work.folder.load(judge.dtype, device)
    else:
        model = checkpoints.load(path, teacher_of(path, work.folder), judge)[0]
        path = path / FILE
    if path.is_file():
        weight = load(path, device)[1].weight(judge.dtype)
        with torch.no_grad():
            for owner in (model.lm_head, model.get_input_embeddings()):
                owner.weight.copy_(weight)
    return model


def arguments() -> argparse.Namespace:
    """The command line of `fit` and `evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fit", "evaluate"], help="or train, with a command line of launch.py")
    add_arguments(parser)
    parser.add_argument("--cache", help="fit: a cache artifact")
    parser.add_argument("--formats", nargs="+", default=["t4r16"])
    parser.add_argument("--output", default="embedding")
    parser.add_argument("--students", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
