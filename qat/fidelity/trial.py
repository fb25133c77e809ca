"""Chooses a model's pass: the fastest one that gives the results of the model's own forward pass.

Shapes: X positions, D hidden, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.errors import ArtifactError, ConfigError, NumericsError
from qat.fidelity.exact import SHORT, in_fp32
from qat.fidelity.sample import Sample
from qat.flow import through_all
from qat.forward import FAST, FUSED, OWN, Pass, body, prepare, trying, use, used
from qat.head import OutputHead, output_weight
from qat.machine import Machine, widened
from qat.models import ModelFolder
from qat.models.streamed import each_hidden, stream_of
from qat.peaks import COMPARISON, peaks

log = logging.getLogger(__name__)

TOLERANCE = 2e-3  # largest difference of log-probabilities in fp32 (nats), about the rounding of 16-bit storage
RECORDED = 0.02  # maximum median KL (nats) between a cache and the teacher; 16-bit recording may cause it
# In 16 bits, a pass may differ from fp32 by TIMES the difference of the model's own pass, plus SLACK. The differences
# compared are quantiles over positions (SHARE), because the last bit may change which expert a token is sent to.
TIMES, SLACK, SHARE = 4, 0.02, 0.75


@torch.no_grad()
def settle(
    teacher: ModelFolder, machine: Machine, sample: Sample, model: PreTrainedModel | None = None, repack: bool = False
) -> Pass:
    """Finds the fastest pass that is the teacher's own, unless this job has found it for such rows before.

    Whatever the teacher loads from here on, for this type and kind of device, is computed by it.

    Args:
        teacher: it.
        machine: type and device.
        sample: real rows, as they will be given.
        model: the teacher as it was loaded, if it is; it takes the pass.
        repack: documents that share a row may be given rows of their own instead.

    Returns:
        The pass; `joined` is false where each document needs rows of its own.

    Raises:
        ConfigError: no pass over whole rows is the model's own.
        ArtifactError: the rows are of a cache that says something else than the teacher.
        NumericsError: its own pass gives NaN.
    """
    kind, passes = (machine.dtype, machine.device.type), teacher.found.passes
    key = (*kind, *sample.shape)
    if key not in passes:
        model = model or teacher.load(machine.dtype, machine.device)
        trial = Trial(f"{teacher.name} ({type(model).__name__})", model, sample)
        with peaks.phase(COMPARISON):
            passes[key] = trial.find(repack)
        if sentence := trial.told(passes[key]):
            log.info(sentence)
    passes[kind] = passes[key]
    if model is not None:
        use(model, passes[key])
    return passes[key]


@torch.no_grad()
def ready(model: PreTrainedModel, sample: Sample, compiled: bool, checkpointing: bool = False) -> None:
    """Prepares a settled model's layers, fused ones only where they say what the model's own pass says."""
    prepare(model, compiled, checkpointing)
    if vars(body(model)).get(FUSED) is None:
        return
    how, trial = used(model), Trial(type(model).__name__, model, sample)
    with peaks.phase(COMPARISON):
        with in_fp32(model):
            wanted = trial.own()
        close = trial.close(how, wanted)
    use(model, how)
    if not close:
        log.info("%s: its layers are compiled, the fused ones say something else", trial.who)
        use(model, replace(how, fused=False))
        prepare(model, compiled, checkpointing)


class Trial:
    """A model on a few rows."""

    def __init__(self, who: str, model: PreTrainedModel, sample: Sample) -> None:
        self.who, self.model, self.sample, self.dtype = who, model, sample, model.dtype

    def find(self, repack: bool) -> Pass:
        """The pass to take; see `settle`. Of rows that predict nothing, nothing can be found out."""
        if not self.sample.documents:
            return replace(OWN, joined=self.sample.starts is not None)
        with in_fp32(self.model):
            wanted = self.own()
            self._check_recorded(wanted)
            how = self._exact(wanted, repack)
        own = replace(OWN, joined=how.joined)
        if self.dtype not in SHORT or self.close(how, wanted):
            return how
        if self.close(own, wanted):
            return own
        short = str(self.dtype).removeprefix("torch.")
        raise ConfigError(f"{self.who} cannot be computed over whole rows in {short}: use instance.precision=fp32")

    def own(self) -> Tensor:
        """Log-probabilities [X, V], fp32, by the model's own forward pass over each document alone."""
        return own_logprobs(self.who, self.model, self.sample.alone(), self.sample.places)

    def _check_recorded(self, wanted: Tensor) -> None:
        """Refuses a cache that says something else: one of another model, or not computed as this one is.

        Raw logits of older caches are known up to a constant, so both sides are renormalised over its tokens.
        """
        if self.sample.recorded is None:
            return
        ids_XK, logprobs_XK = (part.to(wanted.device) for part in self.sample.told())
        theirs, ours = logprobs_XK.log_softmax(-1), wanted.gather(1, ids_XK).log_softmax(-1)
        apart = float((theirs.exp() * (theirs - ours)).sum(-1).median())
        if not apart <= RECORDED:
            raise ArtifactError(
                f"the cache does not hold what {self.who} says, by {apart:.2g} in KL over its tokens: it was recorded"
                " from another model, or before that was computed right; record it anew"
            )

    def _exact(self, wanted: Tensor, repack: bool) -> Pass:
        """The first pass whose log-probabilities are the wanted ones, in fp32."""
        nearest = math.inf
        for how in self._candidates(repack):
            hidden_XD, given = self._by(how)
            nearest = min(nearest, distance(given, wanted))
            if nearest <= TOLERANCE:
                return replace(how, product=self._is_product(hidden_XD, given))
        away = "" if math.isinf(nearest) else f", by {nearest:.2g} in log-probabilities"
        raise ConfigError(
            f"{self.who} says something else of rows of {self.sample.input_ids.shape[1]} tokens than of each document"
            f" alone{away}, so what it predicts depends on more than the tokens before: use another model"
        )

    def _candidates(self, repack: bool) -> Iterator[Pass]:
        """From the fastest on, all with the model's own head."""
        shared = self.sample.starts is not None
        for joined in (True, False) if shared and repack else (shared,):
            yield Pass(FAST.attention, joined=joined)
            yield Pass(OWN.attention, joined=joined)

    def close(self, how: Pass, wanted: Tensor) -> bool:
        """Whether a pass in the model's type is about as near to fp32 as the model's own pass in that type."""
        own = self.own()
        return near(self._by(how)[1], own, wanted.to(own.device))

    def _by(self, how: Pass) -> tuple[Tensor, Tensor]:
        """Hidden states [X, D] and log-probabilities [X, V] by a pass over whole rows; NaN where it cannot be taken."""
        use(self.model, how)
        inputs, places = self.sample.together(how.joined, self.model.device)
        with trying() as failed, _uncompiled():
            (hidden,) = each_hidden(self.model, [inputs])
            hidden_XD = hidden[places]
            return hidden_XD, OutputHead(self.model).logits(hidden_XD).log_softmax(-1)
        log.debug("%s by %s: %s", self.who, how, failed)
        return places, torch.full((1, 1), math.nan, dtype=torch.float32, device=places.device)

    def _is_product(self, hidden_XD: Tensor, wanted: Tensor) -> bool:
        weight = output_weight(self.model)
        if weight is None or weight.shape != (wanted.shape[1], hidden_XD.shape[1]):
            return False
        return distance(widened(hidden_XD, weight).log_softmax(-1), wanted) <= TOLERANCE

    def told(self, how: Pass) -> str:
        """Why a pass is not the fastest one; empty for the fastest."""
        reasons = []
        if how.attention != FAST.attention:
            reasons.append("attention is computed by transformers' own code, since the faster one differs")
        if not how.product:
            reasons.append("logits are computed by its own code, which does more than multiply with the head")
        if self.sample.starts is not None and not how.joined:
            reasons.append("each document gets rows of its own (cache.packing=rows), since in one row they would mix")
        return f"{self.who}: {'; '.join(reasons)}" if reasons else ""


def own_logprobs(who: str, model: PreTrainedModel, texts: list[Tensor], places: list[Tensor]) -> Tensor:
    """Log-probabilities [X, V], fp32, by a model's own forward pass.

    Args:
        who: it is, in a sentence.
        model: which computes by itself from here on.
        texts: token ids [1, T], each read alone.
        places: of each text.

    Raises:
        ConfigError: it reads no plain text.
        NumericsError: it gives NaN.
    """
    use(model, OWN)
    parts = []
    with trying() as failed, _uncompiled():
        for logits, at in zip(_own_logits(model, texts), places, strict=True):
            parts.append(logits(at.to(model.device)))
    if failed:
        raise ConfigError(
            f"{who} cannot read plain text ({failed[0]}): use another model, or instance.precision=fp32 if that helps"
        )
    wanted = torch.cat(parts).float().log_softmax(-1)
    if wanted.isnan().any():
        raise NumericsError("the teacher's logits hold NaN or infinity: try instance.precision=fp32")
    return wanted


def _own_logits(model: PreTrainedModel, texts: list[Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each text, what gives the logits [X, V] at places [X] of it, by the model's own code.

    Of a model whose decoder layers lie in files each one takes all texts before the next one is read. That gives what
    its own pass gives: it was looked at when the model was first opened.
    """
    if stream_of(model) is None:
        for ids in texts:
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            yield lambda places, logits=logits: logits[0, places]  # type: ignore[misc]
        return
    head = OutputHead(model)
    for states in through_all(model, [{"input_ids": ids} for ids in texts]):
        yield lambda places, states=states: head.logits(states[0, places])  # type: ignore[misc]


def near(given: Tensor, own: Tensor, wanted: Tensor) -> bool:
    """Whether log-probabilities [X, V] in 16 bits are about as near to those in fp32 as the model's own in 16 bits."""
    allowed = TIMES * float(_distances(own, wanted).quantile(SHARE)) + SLACK
    return float(_distances(given, wanted).quantile(SHARE)) <= allowed


def _uncompiled() -> AbstractContextManager[None]:
    """Inside, nothing is compiled: compiling takes longer than computing a few rows."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def distance(given: Tensor, wanted: Tensor) -> float:
    """The largest difference of log-probabilities [X, V]; infinite where one is NaN."""
    return float(_distances(given, wanted).max())


def _distances(given: Tensor, wanted: Tensor) -> Tensor:
    """The largest difference [X] at each position; what both sides rule out is none."""
    apart = torch.where(given == wanted, 0, (given - wanted).abs())
    return apart.nan_to_num(math.inf, math.inf).amax(1)
