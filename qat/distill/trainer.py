"""The training loop: reads batches, makes steps, evaluates on held-out text and saves states."""

import hashlib
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cache.batch import Batch
from qat.cache.reader import CacheReader
from qat.checkpoint_files import refuse_other_adapters
from qat.config import ModeConfig, TrainConfig
from qat.console import progress
from qat.distill import curvature, optim
from qat.distill.lengths import pattern
from qat.distill.loss import KD_TEMPERATURE, Loss, topk_kl
from qat.distill.moments import STATE
from qat.distill.optim import Optimizer
from qat.distill.parameters import Learners, names
from qat.distill.state import State, States, misfit, random_state, set_random_state
from qat.distill.step import Figures, Step
from qat.errors import ArtifactError, ConfigError, NumericsError
from qat.fidelity import Sample
from qat.forward import hidden_states, prepare
from qat.machine import Machine
from qat.processes import Ranks
from qat.quant import adapter
from qat.quant.architectures import learns
from qat.quant.linear import Quantized, QuantLinear

log = logging.getLogger(__name__)

MAX_SKIPS = 10  # skipped steps in a row after which training stops
SKIPPED = "the loss or its gradient was not finite, or no position counted,"
REMEDY = "lower train.lr, or use a loss.temperature nearer to 1"
FEWEST = 0.5  # smallest share of counted steps; training with fewer is refused
LOOKED_AT = 4096  # numbers of each tensor that are compared to see whether anything was learnt


@dataclass(frozen=True)
class HeldOut:
    """Means over the held-out split: of the training loss, and of the run log's measure."""

    loss: float
    kd_loss: float


@dataclass
class Progress:
    """The progress of training, without the parameters: small enough for a manifest.

    Held-out figures are those before the first step, where the loss that is trained was lowest, and the last ones.
    """

    step: int = 0  # number of steps made
    best_step: int = 0
    loss_initial: float = math.nan
    loss_best: float = math.inf
    loss_final: float = math.nan
    kd_loss_initial: float = math.nan
    kd_loss_best: float = math.nan
    kd_loss_final: float = math.nan
    tokens: int = 0
    seconds: float = 0.0  # seconds spent in training steps, without evaluations
    skipped: int = 0  # number of skipped steps
    skipped_in_a_row: int = 0
    changed: bool = False  # whether the parameters differ from those before the first step
    logged: int = 0  # number of rows reported


@dataclass
class History(Progress):
    """Progress and the rows of `metrics.jsonl`."""

    rows: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains a student in place."""

    def __init__(
        self,
        student: PreTrainedModel,
        layers: dict[str, tuple[str, Quantized]],
        cache: tuple[CacheReader, CacheReader],
        train: TrainConfig,
        mode: ModeConfig,
        loss: Loss,
        machine: Machine,
        seed: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - immutable
    ) -> None:
        """Chooses the parameters that learn.

        Args:
            student: the model; `layers` are its quantized modules with their kinds, by name.
            layers: name to kind and module.
            cache: readers of the training and the evaluation split.
            train: steps, batch and rates.
            mode: which kinds of layers learn, or get adapters that do; weights that stay are computed once and kept.
            loss: the distillation loss.
            machine: micro-batch and compute type.
            seed: of the data order, and of what new adapters are drawn from.
            ranks: the processes that share each batch.

        Raises:
            ConfigError: nothing learns, or too little to share out, or adapters have another rank or weight already.
        """
        self.student, self.train, self.machine, self.seed, self.ranks = student, train, machine, seed, ranks
        self.training, self.held_out_rows = cache
        self.length = int(self.training.meta["length"])
        self._pattern = pattern(train.lengths, train.shares, train.batch_size, self.length)
        learning = _learning(layers, mode, machine.dtype)
        for known in adapter.adapters(student).values():  # of a checkpoint that was fetched after words were checked
            refuse_other_adapters((known.rank, known.alpha), (mode.rank, mode.alpha))
        if mode.rank:
            adapter.begin(cast(dict[str, QuantLinear], learning), mode.rank, mode.alpha, seed)
        if train.learn.latent > 0:
            kinds = {name: kind for name, (kind, _) in layers.items()}
            curvature.measure(student, learning, kinds, self.training, ranks)
        self.unlearned = _fingerprint(layers, names(learning, train.learn))
        self.learners = Learners(student, learning, train.learn, machine, train.snap_fp16, ranks)
        if not self.learners.parameters:
            raise ConfigError(f"mode={mode.name} trains no quantized layer: choose another one, or quantize more")
        self.optimizer = Optimizer(self.learners.own, train, machine.device, machine.host_moments)
        self.step = Step(student, self.learners, self.optimizer, loss, train, machine, ranks)
        self.step.confirm([Sample.of_rows(rows) for rows in cuts(self.training, train)])
        self.history = History()
        self._before = self._some()
        self._shown = math.nan  # latest loss

    def run(
        self,
        report: Callable[[dict[str, float]], None],
        on_best: Callable[[], None],
        states: States | None = None,
    ) -> History:
        """All remaining steps, with evaluations before the first, every `eval_every` and after the last.

        Args:
            report: is given each step's and each evaluation's figures.
            on_best: is called when the loss that is trained is the lowest so far on held-out text, the start included.
            states: where states go every `save_every` steps, after the last, and when asked to stop.

        Raises:
            NumericsError: the held-out loss is not finite, hardly any step counted, or nothing was learnt.
            KeyboardInterrupt: SIGINT or SIGTERM came; the state is on disk.
        """

        def tell(row: dict[str, float]) -> None:
            self.history.rows.append(row)
            self.history.logged += 1
            report(row)

        try:
            with stop_signals() as stopping:
                self._run(tell, on_best, states, stopping)
        finally:
            if states is not None:
                states.wait()
            prepare(self.student, False, False)
        if states is not None:
            states.thin()
        return self.history

    def _run(
        self,
        tell: Callable[[dict[str, float]], None],
        on_best: Callable[[], None],
        states: States | None,
        stopping: threading.Event,
    ) -> None:
        history, train = self.history, self.train
        if history.step == 0:
            self._look(tell, on_best)
        with (
            progress("distillation", train.steps, "steps", there=history.step) as advance,
            closing(self.batches(history.step)) as batches,
        ):
            for some in batches:
                stop = self._one(some, tell, stopping.is_set())
                last = history.step == train.steps
                if history.step % train.eval_every == 0 or last:
                    self._look(tell, on_best)
                if history.step % train.save_every == 0 or last or stop:
                    self._save(states)
                if stop:
                    raise Stopped
                advance(1, self._note())
        self._check_learnt()

    def _save(self, states: States | None) -> None:
        """Has the state written by the first process, to which others give what they have of it."""
        if states is not None:
            states.wait()  # two at once would take twice the memory
        if states is not None or self.learners.shared is not None:
            state = self.state()
            if states is not None:
                states.save(state)

    def _one(self, batches: list[Batch], tell: Callable[[dict[str, float]], None], stop: bool) -> bool:
        """One step and its row; True when a process was asked to stop."""
        history, factor = self.history, optim.factor(self.history.step, self.train)
        began = time.monotonic()
        figures = self.step(batches, factor, stop)
        history.seconds += time.monotonic() - began
        history.step += 1
        history.tokens += self.train.batch_size * self.length
        self._count(figures)
        row = {
            "step": history.step,
            "loss": figures.loss,
            "grad_norm": figures.grad_norm,
            "lr": self.train.lr * factor,
            "tokens": self.train.batch_size * self.length,
            "skipped_steps": history.skipped,
        }
        tell(row)
        if history.skipped_in_a_row >= MAX_SKIPS:
            raise NumericsError(
                f"{SKIPPED} in {MAX_SKIPS} steps in a row, up to step {history.step}: checkpoints/best of"
                f" this run is the last good one; {REMEDY}"
            )
        return figures.stop

    def _count(self, figures: Figures) -> None:
        history = self.history
        history.skipped += figures.skipped
        history.skipped_in_a_row = history.skipped_in_a_row + 1 if figures.skipped else 0
        self._shown = figures.loss

    def _note(self) -> str:
        skipped = f", {self.history.skipped} steps skipped" if self.history.skipped else ""
        return f"loss {self._shown:.3f}, held-out {self.history.loss_final:.3f}{skipped}"

    def _look(self, tell: Callable[[dict[str, float]], None], on_best: Callable[[], None]) -> None:
        """One evaluation on the held-out split."""
        history, found = self.history, self.held_out()
        if not math.isfinite(found.loss + found.kd_loss):
            worst = "loss" if not math.isfinite(found.loss) else "kd_loss"
            when = f"after {history.step} steps" if history.step else "before the first step"
            raise NumericsError(f"the held-out {worst} is {getattr(found, worst)} {when}: {REMEDY}")
        changed = history.changed or not all(map(torch.equal, self._before, self._some()))
        shared = self.learners.shared is not None
        history.changed = self.ranks.any(changed, self.machine.device) if shared else changed
        tell({"step": history.step, "held_out_loss": found.loss, "kd_loss": found.kd_loss})
        history.loss_final, history.kd_loss_final = found.loss, found.kd_loss
        if history.step == 0:
            history.loss_initial, history.kd_loss_initial = found.loss, found.kd_loss
        if found.loss < history.loss_best:
            history.best_step, history.loss_best, history.kd_loss_best = history.step, found.loss, found.kd_loss
            on_best()

    def _check_learnt(self) -> None:
        """Refuses training without effect, whose checkpoint would be taken for a trained one."""
        steps, counted = self.history.step, self.history.step - self.history.skipped
        if counted < FEWEST * steps:
            raise NumericsError(f"only {counted} of {steps} steps counted: in the others {SKIPPED}; {REMEDY}")
        if not self.history.changed:
            raise NumericsError(
                f"{steps} steps have changed nothing, as what they would add is rounded away: use a larger train.lr or"
                " train.grad_clip, or a loss.temperature nearer to 1"
            )

    def _some(self) -> list[Tensor]:
        """A sample of the numbers of every tensor that learns here."""
        flat = [parameter.value.detach().flatten() for parameter in self.learners.own]
        return [values[:: max(1, len(values) // LOOKED_AT)].clone() for values in flat]

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """This process' rows of every step from `first` (from 0) to the last, each read before it is asked for.

        Those of one length are a batch. A step's rows, and which of them are cut how, depend on its number alone, so
        the number is all that a state must hold of the order.
        """
        steps, size = range(first, self.train.steps), self.train.batch_size
        places = sorted(self.ranks.own(torch.arange(size)).tolist(), key=self._pattern.__getitem__, reverse=True)
        counts = Counter(self._pattern[place] for place in places)  # of rows, the longest first
        order = (self._placed(self.training.training_rows(step, size, self.seed))[places] for step in steps)
        with closing(self.training.stream(order, self.machine.device)) as read:
            for batch in read:
                parts = zip(batch.split(list(counts.values())), counts, strict=True)
                yield [part.cut(length) for part, length in parts]

    def _placed(self, rows: Tensor) -> Tensor:
        """A step's rows [B] by place: those that the fewest documents share are where rows are cut least."""
        if not self.train.lengths:
            return rows
        starts = self.training.batch(rows).stored["document_starts"]
        longest_first = sorted(range(len(rows)), key=self._pattern.__getitem__, reverse=True)
        placed = torch.empty_like(rows)
        placed[longest_first] = rows[starts.sum(1).argsort(stable=True)]
        return placed

    def state(self) -> State:
        """Everything that decides how training goes on; whole in the first process, and the same for any number."""
        learners, scaler, tensors = self.learners, self.step.scaler, random_state()
        for p in learners.parameters:
            of_adam = {f"adam.{p.name}.{name}": value for name, value in self.optimizer.state(p).items()}
            found = {f"parameter.{p.name}": p.value} | of_adam
            tensors |= {name: learners.bring(value, p) for name, value in found.items()}
        tensors |= {f"scaler.{name}": getattr(scaler, name).to("cpu", copy=True) for name in ("scale", "good")}
        facts = {item.name: getattr(self.history, item.name) for item in fields(Progress)}
        return State(self.history.step, tensors, facts | {"unlearned": self.unlearned})

    @torch.no_grad()
    def restore(self, state: State, rows: list[dict[str, float]]) -> None:
        """Takes over a state that `state` gave, with the rows reported until then.

        Raises:
            ArtifactError: it is of a training in which other tensors learned, or of another student.
        """
        if state.facts.get("unlearned") != self.unlearned:
            raise ArtifactError(
                f"the state after step {state.step} belongs to a student with other indices or fixed codebooks: give"
                " the checkpoint that the run began with, or start a new run"
            )
        facts, parameters, tensors = state.facts, self.learners.parameters, state.tensors
        if any(item.name not in facts for item in fields(Progress)):
            raise ArtifactError(f"the state after step {state.step} is of an older version: start a new run")
        if wrong := misfit(state, parameters):
            raise ArtifactError(f"the state after step {state.step} {wrong}: start a new run")
        for parameter in self.learners.own:
            parameter.value.copy_(tensors[f"parameter.{parameter.name}"])
            stored = {name: tensors.get(f"adam.{parameter.name}.{name}") for name in STATE}
            self.optimizer.load(parameter, {name: value for name, value in stored.items() if value is not None})
        self.step.scaler.scale.copy_(tensors["scaler.scale"])
        self.step.scaler.good.copy_(tensors["scaler.good"])
        set_random_state(tensors)
        self.history = History(**{item.name: facts[item.name] for item in fields(Progress)}, rows=rows)
        self._before = self._some()
        self.learners.write()

    @torch.no_grad()
    def held_out(self) -> HeldOut:
        """Losses of the student on the held-out split, over all positions that count for each.

        That is the loss that is trained, and the run log's measure: top-k KL at T = 2, times 4.
        """
        self.learners.write()
        sums = torch.zeros(2, 2, dtype=torch.float64)
        with torch.compiler.set_stance("force_eager"):  # compiling once more takes longer than it saves
            own = self.held_out_rows.in_order(self.machine.micro_batch)[self.ranks.rank :: self.ranks.count]
            for stored in self.held_out_rows.stream(own, self.machine.device):
                batch = stored.to(self.machine.device)
                masks = [counts.flatten().cpu() for counts in (self.step.loss.targets(batch)[2], batch.loss_mask)]
                pairs = zip(self._held_out(batch), masks, strict=True)
                sums += torch.stack([torch.stack([values[mask].sum(), mask.sum()]) for values, mask in pairs])
        if self.ranks.count > 1:
            sums = sums.to(self.machine.device)
            self.ranks.sum_([sums])
        if not sums[:, 1].all():
            raise NumericsError("no position of the held-out split counts, so nothing can be measured: record another")
        return HeldOut(*(sums[:, 0] / sums[:, 1]).tolist())

    def _held_out(self, batch: Batch) -> list[Tensor]:
        """Both losses [P] of a batch, float64 on the CPU."""
        head, beside = self.step.head, self.step.loss.teacher
        hidden = hidden_states(self.student, batch.inputs())
        ids, logprobs, _ = self.step.loss.targets(batch)
        teacher = None if beside is None else hidden_states(beside, batch.inputs())
        kept = batch.topk_ids.flatten(0, 1)
        found = [
            head.losses(hidden, ids.flatten(0, 1), logprobs.flatten(0, 1), teacher),
            topk_kl(head.logits(hidden, kept), batch.topk_logprobs.flatten(0, 1), KD_TEMPERATURE),
        ]
        return [values.cpu().double() for values in found]


class Cut:
    """Rows of a cache cut into pieces of so many tokens, as training computes them; read like a split."""

    def __init__(self, reader: CacheReader, length: int) -> None:
        self._reader, self._length, self.rows = reader, length, reader.rows

    def batch(self, rows: Tensor) -> Batch:
        """The pieces of the rows with these numbers [B]."""
        return self._reader.batch(rows).cut(self._length)


def cuts(reader: CacheReader, train: TrainConfig) -> list[Cut]:
    """A cache's rows in each of the lengths that training cuts them into."""
    return [Cut(reader, length) for length in train.lengths or [int(reader.meta["length"])]]


def _fingerprint(layers: dict[str, tuple[str, Quantized]], learned: set[str]) -> str:
    """SHA-256 of the quantized layers without what the state holds; it must be the same when training continues."""
    found = hashlib.sha256()
    for layer, (_, module) in sorted(layers.items()):
        for name, value in {"indices": module.indices, **module.parts()}.items():
            # Indices that follow from latent weights, which the state holds
            chosen = name == "indices" and f"{layer}.latent" in learned
            if not chosen and f"{layer}.{name}" not in learned:
                found.update(f"{layer}.{name}".encode())
                found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _learning(layers: dict[str, tuple[str, Quantized]], mode: ModeConfig, dtype: torch.dtype) -> dict[str, Quantized]:
    """The layers that learn; the weights of the others, and of those that learn by adapters, are computed once."""
    found = {name: layer for name, (role, layer) in layers.items() if learns(mode, role, layer.format)}
    for name, (_, layer) in layers.items():
        if name not in found or mode.rank:
            layer.bake(dtype)
    return found


class Stopped(KeyboardInterrupt):
    """A signal came and the state is saved."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second one stops at once, as ever.

    Only the main thread of a process gets signals; in any other the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    arrived: list[signal.Signals] = []
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    def ask(which: int, frame: FrameType | None) -> None:
        log.info("%s: saving the state after this step", signal.Signals(which).name)
        arrived.append(signal.Signals(which))
        asked.set()
        restore()

    def restore() -> None:
        for which, handler in before.items():
            signal.signal(which, handler)

    for which in before:
        signal.signal(which, ask)
    try:
        yield asked
    except Stopped:
        if arrived and callable(before[arrived[0]]):
            signal.raise_signal(arrived[0])  # the state is saved: the signal now goes to the previous handler
        raise
    finally:
        restore()
