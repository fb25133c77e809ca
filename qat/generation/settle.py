"""Which loop writes a teacher's text: the fastest one whose logits are those of the model's own forward pass.

Each loop continues real prompts by a few tokens; one prompt is long enough to fill windows and states. The
comparison is that of `qat.fidelity`: in fp32 for the loop, in the model's own type for its kernels.

Shapes: R rows, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.errors import ConfigError
from qat.fidelity.exact import SHORT, in_fp32
from qat.fidelity.trial import TOLERANCE, distance, near, own_logprobs
from qat.forward import trying, use, used
from qat.generation.loop import Sampling, Writer
from qat.generation.own import OwnWriter
from qat.models import ModelFolder

log = logging.getLogger(__name__)

TOKENS = 3  # tokens compared behind each prompt; more would make the loop record a CUDA graph
FEW = 3  # tokens of the shorter test prompt; the longer one has three times as many
# The loops to try, fastest first, and whether their logits are a plain product with the head: `Writer`; `OwnWriter`
# with a key-value cache ("own"); `OwnWriter` that reads the whole text for each token ("anew").
LOOPS = (("plain", True), ("plain", False), ("own", False), ("anew", False))

Turn = Callable[[], AbstractContextManager[None]]


def writer(
    teacher: ModelFolder,
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    rows: int,
    compiled: bool = False,
    turn: Turn = nullcontext,
) -> Writer | OwnWriter:
    """A writer of answers to these prompts; what was found once in a job is not looked for again.

    Args:
        teacher: whose model it is.
        model: the teacher, as it was loaded.
        prompts: all of them, at least one.
        sampling: of every answer.
        rows: written at once.
        compiled: see `Writer`.
        turn: see `Writer`.

    Raises:
        ConfigError: no loop gives what the model's own forward pass gives.
    """
    longest = max(map(len, prompts))
    key, positions = (model.dtype, model.device.type), longest + sampling.tokens
    proven, loop, product = teacher.found.loops.get(key, (0, "", False))
    if proven < positions:
        trial = _Trial(f"{teacher.name} ({type(model).__name__})", model, _probes(model, prompts, positions), sampling)
        loop, product = trial.find()
        teacher.found.loops[key] = positions, loop, product
    use(model, replace(used(model), product=product))
    return _made(loop, model, sampling, rows, longest, compiled, turn)


def _made(
    loop: str,
    model: PreTrainedModel,
    sampling: Sampling,
    rows: int,
    longest: int,
    compiled: bool = False,
    turn: Turn = nullcontext,
) -> Writer | OwnWriter:
    if loop == "plain":
        return Writer(model, sampling, rows, longest, compiled, turn)
    return OwnWriter(model, sampling, rows, loop == "own", turn)


def _probes(model: PreTrainedModel, prompts: list[list[int]], positions: int) -> list[list[list[int]]]:
    """Two batches of prompts: the longest one again and again until it is long enough, and two of unlike lengths.

    Whatever a model does otherwise from some length on has that length among the numbers of its settings, so
    that the largest of them below `positions` is long enough.
    """
    longest = max(prompts, key=len)
    told = max((n for n in numbers(model.config.to_dict()) if n < positions), default=0)
    length = min(max(told, len(longest)) + 1, max(1, positions - TOKENS))
    return [[(longest * (length // len(longest) + 1))[:length]], [longest[:FEW], longest[: 3 * FEW]]]


def numbers(settings: Any) -> Iterator[int]:
    """All whole numbers in some settings."""
    if isinstance(settings, dict | list | tuple):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from numbers(value)
    elif isinstance(settings, int):
        yield settings


class _Trial:
    """A model that goes on from a few prompts."""

    def __init__(self, who: str, model: PreTrainedModel, batches: list[list[list[int]]], sampling: Sampling) -> None:
        self.who, self.model, self.batches = who, model, batches
        self.sampling = replace(sampling, tokens=TOKENS, greedy=TOKENS, ends=())  # all tokens of all are compared

    @torch.no_grad()
    def find(self) -> tuple[str, bool]:
        """The loop to use, and whether logits are a product with the head."""
        for loop, product in LOOPS:
            if self._is_right(loop, product):
                if loop != "plain":
                    log.info("%s: its text is written by transformers' own loop, the faster one differs", self.who)
                return loop, product
        raise ConfigError(
            f"{self.who} cannot write text: no loop says what its forward pass says; give text as it is (data=text)"
        )

    def _is_right(self, loop: str, product: bool) -> bool:
        with in_fp32(self.model):
            texts, places, given = self._written(loop, product)
            if not texts or distance(given, self._own(texts, places)) > TOLERANCE:
                return False
        if self.model.dtype not in SHORT:
            return True
        texts, places, given = self._written(loop, product)
        if not texts:
            return False
        with in_fp32(self.model):
            wanted = self._own(texts, places)
        return near(given, self._own(texts, places), wanted.to(given.device))

    def _own(self, texts: list[Tensor], places: list[Tensor]) -> Tensor:
        return own_logprobs(self.who, self.model, texts, places)

    def _written(self, loop: str, product: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Texts, the places in them at which the loop chose a token, and its log-probabilities there."""
        use(self.model, replace(used(self.model), product=product))
        texts, places, given = [], [], []
        with trying() as failed:
            for prompts in self.batches:
                seen = _Seen(len(prompts))
                write = _made(loop, self.model, self.sampling, len(prompts), max(map(len, prompts)))
                write.watch = seen.watch
                written = write(prompts, 0, lambda amount=1, note="": None).tolist()
                for prompt, answer, logprobs in zip(prompts, written, seen.logprobs, strict=True):
                    texts.append(torch.tensor([prompt + answer]))
                    places.append(torch.arange(len(logprobs)) + len(prompt) - 1)
                    given += logprobs
            return texts, places, torch.stack(given)
        log.debug("%s by %s: %s", self.who, loop, failed)
        return [], [], torch.empty(0, dtype=torch.float32)


class _Seen:
    """Log-probabilities [V] that a loop chose from, in each text of a batch."""

    def __init__(self, texts: int) -> None:
        self.logprobs: list[list[Tensor]] = [[] for _ in range(texts)]

    def watch(self, texts_E: Tensor, logits_EV: Tensor) -> None:
        """Takes those of some texts."""
        for text, logits in zip(texts_E.tolist(), logits_EV, strict=True):
            self.logprobs[text].append(logits.log_softmax(-1))
