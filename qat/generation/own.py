"""Continuations by transformers' own loop, for models that the faster one does not compute as they are.

Each token is chosen from the model's logits as the faster loop chooses it, by the same draws. Prompts of one
length go together, so that nothing is padded.

Shapes: R rows, N texts of a batch, A tokens of an answer, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qat.console import Advance
from qat.generation.loop import Sampling, Watch, drawn, overlook
from qat.generation.sampling import choose
from qat.models import generate


class OwnWriter:
    """Continues up to `rows` prompts at once, like `qat.generation.Writer`."""

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        rows: int,
        remembers: bool = True,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """As the other; `remembers` keeps what was read (keys, values, states) instead of reading it again."""
        self.model, self.sampling, self.rows, self.remembers, self.turn = model, sampling, rows, remembers, turn
        self._end = min(sampling.ends, default=0)  # token that fills a row behind its end
        self.watch: Watch = overlook

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seed: int, advance: Advance) -> Tensor:
        """Answers [len(prompts), A], int32 in host memory: each up to its end token, or whole."""
        written_NA = torch.full((len(prompts), self.sampling.tokens), self._end, dtype=torch.int32)
        uniform_NA = drawn(self.sampling, len(prompts), seed)
        settings = GenerationConfig(
            max_new_tokens=self.sampling.tokens,
            do_sample=False,
            use_cache=self.remembers,
            eos_token_id=list(self.sampling.ends) or None,
            pad_token_id=self._end,
        )
        with self.turn():
            for texts_R in _alike(prompts, self.rows):
                ids = torch.tensor([prompts[text] for text in texts_R.tolist()], device=self.model.device)
                draws_RA, watch = uniform_NA[texts_R].to(ids.device), partial(self.watch, texts_R)
                choosing = _Choice(draws_RA, self.sampling.temperature, watch)
                found = generate(self.model, ids, settings, logits_processor=LogitsProcessorList([choosing]))
                written_NA[texts_R, : found.shape[1]] = found.cpu().int()
                advance(self.sampling.tokens * len(texts_R))
        return written_NA


def _alike(prompts: list[list[int]], rows: int) -> Iterator[Tensor]:
    """Numbers of prompts of one length, so many at once."""
    order = sorted(range(len(prompts)), key=lambda text: len(prompts[text]))
    for _, alike in groupby(order, key=lambda text: len(prompts[text])):
        yield from torch.tensor(list(alike)).split(rows)


class _Choice(LogitsProcessor):
    """A logits processor that allows only the chosen token."""

    def __init__(self, uniform_RA: Tensor, temperature: float, watch: Callable[[Tensor], None]) -> None:
        self.uniform_RA, self.temperature, self.watch, self.step = uniform_RA, temperature, watch, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_RV = scores.float().contiguous()
        self.watch(logits_RV)
        chosen_R = choose(logits_RV, self.uniform_RA[:, self.step], self.temperature)
        self.step += 1
        return torch.full_like(logits_RV, -torch.inf).scatter_(1, chosen_R[:, None], 0.0)
