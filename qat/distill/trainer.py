"""The training loop: student forward, loss against the cache, one optimizer step, now and then a look.

Logits are never held for a whole batch: hidden states are detached, the head and the loss run over a
few positions at a time and back-propagate at once into the hidden states, which then back-propagate
through the student. The result is that of one backward pass.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cache.reader import Batch, CacheReader
from qat.config import LossKind, ModeConfig, TrainConfig
from qat.console import progress
from qat.distill import optim
from qat.distill.loss import KD_TEMPERATURE, bucket_kl, full_kl, topk_kl
from qat.errors import NumericsError
from qat.machine import Machine
from qat.quant.linear import QuantLinear, baked

POSITIONS = 256  # whose logits over the vocabulary exist at one time


@dataclass
class History:
    """What training saw: rows of `metrics.jsonl`, and the best evaluation."""

    rows: list[dict[str, float]] = field(default_factory=list)
    initial: float = math.nan
    best: float = math.inf
    final: float = math.nan
    tokens: int = 0
    seconds: float = 0.0  # of training steps alone


class Trainer:
    """Trains the tables and scales of a student in place."""

    def __init__(
        self,
        student: PreTrainedModel,
        layers: dict[str, tuple[str, QuantLinear]],
        cache: tuple[CacheReader, CacheReader],
        train: TrainConfig,
        mode: ModeConfig,
        loss: "Loss",
        machine: Machine,
        seed: int,
    ) -> None:
        """Chooses what learns.

        Args:
            student: the model; `layers` are its quantized modules with their kinds, by name.
            layers: name to kind and module.
            cache: readers of the training and the evaluation split.
            train: steps, batch and rates.
            mode: which kinds learn; the others are computed once and kept.
            loss: the distillation loss.
            machine: micro-batch and compute type.
            seed: of the data order.
        """
        self.student, self.train, self.loss, self.machine, self.seed = student, train, loss, machine, seed
        self.training, self.held_out = cache
        self.parameters = list(_choose(layers, {"mlp": mode.mlp, "attn": mode.attn}, machine.dtype))
        self.optimizer = optim.optimizer(self.parameters, train)
        self.schedule = optim.schedule(self.optimizer, train)

    def run(self, report: Callable[[dict[str, float]], None], on_best: Callable[[], None]) -> History:
        """All steps, with an evaluation before the first, every `eval_every` and after the last.

        Args:
            report: is given each step's and each evaluation's figures.
            on_best: is called when the held-out KD loss is the lowest so far, the start included.

        Raises:
            NumericsError: the loss or the gradient is not finite.
        """
        history = History()

        def look(step: int) -> None:
            kd = self.kd_loss()
            if not math.isfinite(kd):
                raise NumericsError(f"the held-out KD loss is {kd} after {step} steps: lower train.lr")
            history.rows.append({"step": step, "kd_loss": kd})
            report(history.rows[-1])
            history.final = kd
            if step == 0:
                history.initial = kd
            if kd < history.best:
                history.best = kd
                on_best()

        look(0)
        with progress("distillation", self.train.steps, "steps") as advance:
            for step in range(self.train.steps):
                began = time.monotonic()
                row = self.step(step)
                history.seconds += time.monotonic() - began
                history.tokens += int(row["tokens"])
                history.rows.append(row)
                report(row)
                if (step + 1) % self.train.eval_every == 0 or step + 1 == self.train.steps:
                    look(step + 1)
                advance(1, f"loss {row['loss']:.3f}, held-out KD {history.final:.3f}")
        return history

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the global batch; its figures."""
        rows = self.training.training_rows(step, self.train.batch_size, self.seed)
        batch = self.training.batch(rows)
        positions = int(batch.loss_mask.sum())
        parts = batch.split(self.machine.micro_batch)
        loss = sum(self._backward(part.to(self.machine.device), positions) for part in parts)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.train.grad_clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NumericsError(f"loss {loss} and gradient norm {norm} at step {step + 1}: lower train.lr")
        lr = self.train.lr * optim.rate(step, self.train)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": batch.input_ids.numel(),
        }

    def _backward(self, batch: Batch, positions: int) -> float:
        """Adds the gradient of this micro-batch; returns its share of the mean loss."""
        hidden = self.student.base_model(**batch.inputs()).last_hidden_state[:, :-1][batch.loss_mask]
        loose = hidden.detach().requires_grad_()
        total = 0.0
        targets = self.loss.targets(batch)
        for part in position_chunks(loose, targets):
            logits = self.student.lm_head(part[0]).float()
            loss = self.loss.at(logits, *part[1:]).sum() / positions
            loss.backward()
            total += float(loss.detach())
        hidden.backward(loose.grad)
        return total

    @torch.inference_mode()
    def kd_loss(self) -> float:
        """The run log's measure on the held-out split: top-k KL at T = 2, times 4, over all positions."""
        total = count = 0.0
        with baked(self.student, self.machine.dtype):
            for rows in self.held_out.in_order(self.machine.micro_batch):
                batch = self.held_out.batch(rows).to(self.machine.device)
                hidden = self.student.base_model(**batch.inputs()).last_hidden_state[:, :-1][batch.loss_mask]
                targets = (batch.topk_ids[batch.loss_mask], batch.topk_logprobs[batch.loss_mask])
                for h, ids, logprobs in position_chunks(hidden, targets):
                    values = topk_kl(self.student.lm_head(h).float(), ids, logprobs, KD_TEMPERATURE)
                    total, count = total + float(values.double().sum()), count + values.numel()
        return total / count


class Loss:
    """A distillation loss with what it compares against: the cache, or a teacher beside the student."""

    def __init__(self, kind: LossKind, temperature: float, teacher: PreTrainedModel | None = None) -> None:
        """`teacher` is needed for `full_kl` alone."""
        self.kind, self.temperature, self.teacher = kind, temperature, teacher

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `at` takes beside the logits, each [X, …], at the X positions that count."""
        if self.teacher is None:
            return batch.topk_ids[batch.loss_mask], batch.topk_logprobs[batch.loss_mask]
        with torch.no_grad():
            return (self.teacher.base_model(**batch.inputs()).last_hidden_state[:, :-1][batch.loss_mask],)

    def at(self, logits: Tensor, *targets: Tensor) -> Tensor:
        """The loss of each position."""
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher.lm_head(targets[0]).float()
            return full_kl(logits, teacher, self.temperature)
        ids, logprobs = targets
        if self.kind is LossKind.topk_kl:
            return topk_kl(logits, ids, logprobs, self.temperature)
        return bucket_kl(logits, ids, logprobs)


def _choose(
    layers: dict[str, tuple[str, QuantLinear]], learns: dict[str, bool], dtype: torch.dtype
) -> Iterator[nn.Parameter]:
    """Marks the parameters that learn and yields them; the weights of other layers are computed once."""
    for kind, layer in layers.values():
        if learns[kind]:
            layer.requires_grad_(True)
            yield from (layer.lut, layer.scale_A, layer.rank_magnitude, layer.scale_B)
        else:
            layer.requires_grad_(False)
            layer.bake(dtype)


def position_chunks(hidden: Tensor, targets: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Hidden states and targets [X, …] as pieces of at most POSITIONS positions."""
    return zip(*(tensor.split(POSITIONS) for tensor in (hidden, *targets)), strict=True)
