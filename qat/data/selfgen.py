"""The teacher writes its own training text.

A student that imitates its teacher learns best where the teacher itself goes. As in LLM-QAT (Liu et
al. 2023, section 3.1) the first tokens of an answer are chosen greedily, which keeps it to the
point, and the rest is sampled, which keeps it varied.
"""

import json
from collections.abc import Iterator
from pathlib import Path

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
from qat.artifacts import content_key, write_json
from qat.cache.format import mixed
from qat.config import DataConfig, Start, as_plain
from qat.console import Advance, progress
from qat.data import sources
from qat.data.thinking import chat_tokens
from qat.machine import Machine
from qat.models import ModelFolder

PROMPTS_AT_ONCE = {"cpu": 64, "mps": 64, "cuda": 1024}
ANSWERS = ".answers-"


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
    teacher: ModelFolder, data: DataConfig, seed: int, machine: Machine, scratch: Path
) -> Iterator[tuple[str, list[int]]]:
    """Lets the teacher write from every start, `data.answers` times.

    Answers are kept in `scratch` batch by batch, and those that are there already are not written
    again. Each batch has a seed of its own, so it does not matter when it is written.

    Yields:
        The prompt and the tokens of the whole conversation, end marker included where one came.
    """
    tokenizer = teacher.tokenizer()
    asked = _starts(tokenizer, data, seed) * data.answers
    asked.sort(key=lambda item: len(item[1]))  # equal lengths together: less padding
    size = PROMPTS_AT_ONCE[machine.device.type]
    batches = [asked[first : first + size] for first in range(0, len(asked), size)]
    # Other machines and other starts have other names: what they left is not taken for ours.
    who = content_key([machine.describe(), torch.__version__, size, asked, as_plain(data)])
    files = [scratch / f"{ANSWERS}{who}-{number:05d}.json" for number in range(len(batches))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    model = teacher.load(machine.dtype, machine.device) if missing else None
    todo = sum(len(batches[number]) for number in missing) * data.answer_tokens
    with progress("teacher answers", todo, "tokens") as advance:
        for number, (batch, file) in enumerate(zip(batches, files, strict=True)):
            if number in missing and model is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(mixed(seed, number))
                    write_json(file, generate(model, tokenizer, [ids for _, ids in batch], data, advance))
            replies = json.loads(file.read_text(encoding="utf-8"))
            for (origin, ids), reply in zip(batch, replies, strict=True):
                yield origin, ids + reply


def _starts(tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int) -> list[tuple[str, list[int]]]:
    """What the teacher goes on from, each with its origin."""
    if data.start is Start.tokens:
        return _first_tokens(tokenizer, seed)[: data.documents]
    modes = ["false", "true"] if data.thinking == "both" else [data.thinking]
    asked = sources.prompts(data)[: data.documents]
    return [(prompt, chat_tokens(tokenizer, _ask(prompt), mode, ask=True)) for prompt in asked for mode in modes]


def _first_tokens(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[tuple[str, list[int]]]:
    """Every ordinary token once, in an order that the seed decides, behind the begin marker if there is one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(f"token {token}", [*begin, token]) for token in order if token not in special]


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
