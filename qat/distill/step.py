"""One step: weights written once, gradients of all micro-batches summed, one update.

The result is that of the global batch at once, whatever the micro-batch and however many processes share
the work: each position counts as one over the number of counted positions of the global batch, and all that is
exchanged are sums, and weights of which another process has the states. A loss or gradient that is not finite, and a
batch in which no position counts, leave everything as it was.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.config import TrainConfig
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.distill.optim import Optimizer
from qat.distill.parameters import Learners
from qat.errors import MissingError
from qat.fidelity import Sample, ready
from qat.forward import hidden_states, prepare, used
from qat.graphs import Recorder, recording_stream
from qat.machine import Machine
from qat.processes import Ranks

log = logging.getLogger(__name__)

# Largest micro-batch, in tokens, that is recorded as a graph; above it the GPU takes longer than Python
RECORDED_TOKENS = 16_384
FEW_TOKENS = 4_096  # micro-batch in tokens: smaller ones lose more speed by halving than by checkpointing


@dataclass(frozen=True)
class Figures:
    """Results of a step: mean loss, norm of the gradient, whether it was skipped, whether a rank wants to stop."""

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool


class Scaler:
    """The factor on the loss in fp16, without which most gradients would be zero (Micikevicius et al. 2018).

    Halved when a gradient overflows, doubled after `PATIENCE` steps without; 1 for ever in other types.
    """

    FIRST, PATIENCE = 2.0**16, 2000

    def __init__(self, machine: Machine) -> None:
        self.active = machine.dtype == torch.float16
        self.scale = torch.full((), self.FIRST if self.active else 1.0, dtype=torch.float32, device=machine.device)
        self.good = torch.zeros((), dtype=torch.float32, device=machine.device)

    def update(self, skipped: Tensor) -> None:
        """After a step; `skipped` is 0 or 1."""
        if not self.active:
            return
        self.good.add_(1).mul_(1 - skipped)
        patient = (self.good >= self.PATIENCE).float()
        self.scale.mul_((1 + patient) * (1 - 0.5 * skipped))
        self.good.mul_(1 - patient)


class Step:
    """Makes steps with one student on one device."""

    def __init__(
        self,
        student: PreTrainedModel,
        learners: Learners,
        optimizer: Optimizer,
        loss: Loss,
        train: TrainConfig,
        machine: Machine,
        ranks: Ranks,
    ) -> None:
        self.student, self.learners, self.optimizer, self.loss = student, learners, optimizer, loss
        self.train, self.machine, self.ranks = train, machine, ranks
        self.head = Head(student, loss)
        self.scaler = Scaler(machine)
        zeros = partial(torch.zeros, dtype=torch.float32, device=machine.device)
        self.total, self.skip, self.stop, self.figures = zeros(()), zeros(()), zeros(()), zeros(4)
        self.counted, self.squares = zeros(()), zeros(())
        plain = all(used(model).plain for model in (student, loss.teacher) if model is not None)
        self.recorder = Recorder(_stream(machine) if plain else None)
        self._held: dict[tuple[torch.Size, ...], dict[str, Tensor]] = {}
        self._done = 0  # micro-batches of an attempt; below 0 before weights are exchanged
        prepare(student, machine.compile, bool(machine.checkpointing))
        if loss.teacher is not None:
            prepare(loss.teacher, machine.compile)

    def confirm(self, sample: Sample) -> None:
        """Removes fused layers whose outputs differ from those of the model's own layers."""
        self.learners.write()
        ready(self.student, sample, self.machine.compile, bool(self.machine.checkpointing))
        if self.loss.teacher is not None:
            ready(self.loss.teacher, sample, self.machine.compile)

    def __call__(self, batch: Batch, factor: float, stop: bool = False) -> Figures:
        """One step.

        Args:
            batch: this process' rows of the global batch.
            factor: the schedule's, on all learning rates.
            stop: this process was asked to stop; all of them are told.

        Raises:
            MissingError: not even a single sequence fits into memory.
        """
        self.optimizer.set_factor(factor)
        self.stop.fill_(float(stop))
        self._accumulate(batch, self._positions(batch))
        self.recorder("reduce", self._reduce)
        learners = self.learners
        summed = learners.grads() if learners.shared is None else [*learners.grads_of_norms(), self.squares]
        self.ranks.sum_([*summed, self.total, self.stop])
        if self.optimizer.far is None:
            self.recorder("update", self._update)
        else:
            self._update()  # what goes to the host and back is no part of a recording
        loss, norm, skipped, stopping = self.figures.tolist()
        return Figures(loss, norm, skipped > 0, stopping > 0)

    def _positions(self, batch: Batch) -> Tensor:
        """Number of counted positions of the global batch."""
        count = batch.loss_mask.sum().to(self.machine.device, torch.float32)
        self.ranks.sum_([count])
        self.counted.copy_(count)
        return count.clamp_min(1)

    def _accumulate(self, batch: Batch, positions: Tensor) -> None:
        """Sums the gradients of all micro-batches; uses smaller ones if memory runs out, in any of the processes.

        A process whose memory runs out goes on sending, as the others wait for what it sends.
        """
        while True:
            short = False
            self._done = -1
            try:
                self._attempt(batch, positions)
            except torch.OutOfMemoryError:
                short = True  # leave the handler first: the error keeps the tensors of its frames alive
            if self.learners.shared is not None:
                if short and self.machine.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._finish(batch)
                short = self.ranks.any(short, self.machine.device)
            if not short:
                return
            self._make_room(batch)

    def _attempt(self, batch: Batch, positions: Tensor) -> None:
        parts = self._parts(batch)
        size = -(-len(batch.input_ids) // parts)  # micro-batches of equal size need only one compiled form
        self.learners.begin(parts)
        self.recorder(("open", parts > 1), self._open)
        self.learners.exchange()
        self._done = 0
        for micro in batch.to(self.machine.device).split(size):
            self._add(micro, micro.loss_mask / positions, parts > 1)
            self.learners.finish()
            self._done += 1

    def _parts(self, batch: Batch) -> int:
        """Number of micro-batches; the same in processes that meet in every one."""
        return max(1, -(-self._rows(batch) // self.machine.micro_batch))

    def _rows(self, batch: Batch) -> int:
        """Rows of the batch here; where processes meet in every micro-batch, of the one that has most."""
        return len(batch.input_ids) if self.learners.shared is None else -(-self.train.batch_size // self.ranks.count)

    def _finish(self, batch: Batch) -> None:
        """Takes part in what is left of an attempt, with nothing to add."""
        if self._done < 0:
            self.learners.exchange()
        for _ in range(max(self._done, 0), self._parts(batch)):
            self.learners.finish()
        self.learners.collect()

    def _open(self) -> None:
        self.learners.compute()
        self.total.zero_()

    def _add(self, micro: Batch, weight_BP: Tensor, adding: bool) -> None:
        """Adds a micro-batch's loss and gradients, from tensors that stay in place where it is recorded."""
        inputs = micro.inputs()
        outputs = {"ids": micro.topk_ids, "logprobs": micro.topk_logprobs, "weight": weight_BP}
        alone = self.learners.shared is None  # what is sent on the way is no part of a recording
        if self.recorder.stream is None or not alone or micro.input_ids.numel() > RECORDED_TOKENS:
            self._backward(inputs, outputs)
            return
        key = (micro.input_ids.shape, micro.topk_ids.shape)
        tensors = {**inputs, **outputs}
        held = self._held.setdefault(key, {name: value.clone() for name, value in tensors.items()})
        for name, value in tensors.items():
            held[name].copy_(value)
        static = {name: held[name] for name in inputs}, {name: held[name] for name in outputs}
        self.recorder(("add", adding, *key), lambda: self._backward(*static))

    def _backward(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Forward, loss and backward; the head's gradient is computed at once and not kept by autograd."""
        beside = self.loss.teacher
        with torch.no_grad():  # first, as the student's weights may still be on their way
            teacher_PD = None if beside is None else hidden_states(beside, inputs)
        self.learners.arrive()
        hidden_PD = hidden_states(self.student, inputs)
        value, grad_PD = self.head.backward(
            hidden_PD.detach(),
            outputs["ids"].flatten(0, 1),
            outputs["logprobs"].flatten(0, 1),
            outputs["weight"].flatten() * self.scaler.scale,
            teacher_PD,
        )
        self.total += value / self.scaler.scale
        hidden_PD.backward(grad_PD)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Gradients of all that learns here, and where processes have shares of that, the square of their norm."""
        self.learners.reduce()
        if self.learners.shared is not None:
            self.squares.copy_(nn.utils.get_total_norm(self.learners.grads_of_layers()).square())

    def _norm(self) -> Tensor:
        """The norm of all gradients, summed over the ranks."""
        if self.learners.shared is None:
            return nn.utils.get_total_norm(self.learners.grads())
        norms = self.learners.grads_of_norms()
        return (self.squares + nn.utils.get_total_norm(norms).square() if norms else self.squares).sqrt()

    @torch.no_grad()
    def _update(self) -> None:
        """Unscales, clips and applies the gradients, or none of them; all on the device."""
        norm = self._norm() / self.scaler.scale
        self.skip.copy_(~(norm.isfinite() & self.total.isfinite() & (self.counted > 0)))
        self.learners.shift(self.scaler.scale)
        self.optimizer.step(self.scaler.scale * (norm / self.train.grad_clip).clamp_min(1), self.skip)
        self.scaler.update(self.skip)
        self.figures.copy_(torch.stack([self.total, norm, self.skip, self.stop]))

    def _make_room(self, batch: Batch) -> None:
        """Reduces the memory of later steps without changing their result."""
        self.recorder.forget()
        self._held.clear()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
        held = min(self.machine.micro_batch, self._rows(batch))
        if self.machine.checkpointing is None and held * batch.input_ids.shape[1] <= FEW_TOKENS:
            log.info("out of memory: activations are computed twice from here on")
            self.machine = replace(self.machine, checkpointing=True)
            prepare(self.student, self.machine.compile, True)
        elif held > 1:
            log.info("out of memory: %d sequences at once from here on, the batch stays as it is", held // 2)
            self.machine = replace(self.machine, micro_batch=held // 2)
        else:
            raise MissingError(
                "one sequence does not fit into the device's memory: set instance.checkpointing=true or a shorter"
                " cache.length, or use a larger device"
            )


def _stream(machine: Machine) -> torch.cuda.Stream | None:
    """A stream on which work can be recorded; it becomes the current stream of this thread."""
    stream = recording_stream(machine.device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(machine.device))
        torch.cuda.set_stream(stream)
    return stream
