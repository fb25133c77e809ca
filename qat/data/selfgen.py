"""The teacher writes its own training text.

A student that imitates its teacher learns best where the teacher itself goes. As in LLM-QAT (Liu et
al. 2023, section 3.1) the first tokens of an answer are chosen greedily, which keeps it to the
point, and the rest is sampled, which keeps it varied.
"""

from collections.abc import Iterator

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qat import models
from qat.config import DataConfig
from qat.console import Advance, progress
from qat.data.sources import chat_tokens
from qat.machine import Machine
from qat.models import ModelFolder

PROMPTS_AT_ONCE = 64


class Sample(LogitsProcessor):
    """Chooses each next token: the most likely one at first, then one drawn from the distribution.

    It leaves the chosen token as the only possible one. Drawing by the inverse of the cumulative
    distribution is much cheaper than `torch.multinomial`, which draws a number for every token.
    """

    def __init__(self, start: int, data: DataConfig) -> None:
        self.sampled_from = start + data.greedy_tokens
        self.temperature = data.temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` [B, T] so far, `scores` [B, V] of the next token."""
        if input_ids.shape[1] < self.sampled_from:
            chosen = scores.argmax(1, keepdim=True)
        else:
            cumulative = (scores.float() / self.temperature).softmax(1).cumsum(1)
            drawn = torch.rand(len(scores), 1, device=scores.device) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, drawn).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class Ticker(StoppingCriteria):
    """Never stops anything: it reports progress after every token."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """`input_ids` [B, T] so far."""
        self.advance(input_ids.shape[0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def answer(
    teacher: ModelFolder, prompts: list[str], data: DataConfig, seed: int, machine: Machine
) -> Iterator[tuple[str, list[int]]]:
    """Asks the teacher every prompt `data.answers` times.

    Yields:
        The prompt and the tokens of the whole conversation, end marker included where one came.
    """
    tokenizer = teacher.tokenizer()
    model = teacher.load(machine.dtype, machine.device)
    modes = ["false", "true"] if data.thinking == "both" else [data.thinking]
    asked = [(p, chat_tokens(tokenizer, _ask(p), mode, ask=True)) for p in prompts for mode in modes] * data.answers
    asked.sort(key=lambda item: len(item[1]))  # equal lengths together: less padding
    with (
        torch.random.fork_rng(),
        progress("teacher answers", len(asked) * data.answer_tokens, "tokens") as advance,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(asked), PROMPTS_AT_ONCE):
            batch = asked[start : start + PROMPTS_AT_ONCE]
            answers = generate(model, tokenizer, [ids for _, ids in batch], data, advance)
            for (prompt, ids), reply in zip(batch, answers, strict=True):
                yield prompt, ids + reply


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[list[int]],
    data: DataConfig,
    advance: Advance,
) -> list[list[int]]:
    """Answers a batch of rendered prompts; each answer ends with the end marker or at its longest."""
    inputs = tokenizer.pad({"input_ids": asked}, return_tensors="pt").to(model.device)
    start = inputs["input_ids"].shape[1]
    settings = GenerationConfig(
        max_new_tokens=data.answer_tokens,
        do_sample=False,  # `Sample` has already chosen
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    written = models.generate(
        model,
        inputs["input_ids"],
        settings,
        attention_mask=inputs["attention_mask"],
        logits_processor=LogitsProcessorList([Sample(start, data)]),
        stopping_criteria=StoppingCriteriaList([Ticker(advance)]),
    )
    return [_until_end(row, tokenizer.eos_token_id) for row in written.tolist()]


def _ask(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
