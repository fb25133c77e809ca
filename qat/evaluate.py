"""How good a student is, on text that training never saw.

`kl` is KL(teacher‖student) over the whole vocabulary at T = 1, the teacher running beside the student;
`kd_loss` is the run log's measure, over the teacher's top-k at T = 2, times 4; `perplexity` is of the text
itself; `top1_agreement` is the share of positions where both prefer the same token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat.cache.reader import CacheReader, Text
from qat.console import progress
from qat.data.thinking import chat_tokens
from qat.distill.head import position_chunks
from qat.distill.loss import KD_TEMPERATURE, full_kl, topk_kl
from qat.errors import NumericsError
from qat.machine import Machine
from qat.models import generate
from qat.quant.linear import baked

SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for sleeping better.",
    "What is 12 plus 30?",
)


@dataclass(frozen=True)
class Metrics:
    """Means over all positions of a split."""

    kl: float
    kd_loss: float
    perplexity: float
    teacher_perplexity: float
    top1_agreement: float


@torch.inference_mode()
def evaluate(
    student: PreTrainedModel, teacher: PreTrainedModel, held_out: CacheReader | Text, top_k: int, machine: Machine
) -> Metrics:
    """Compares two models on all positions of a split that count.

    Args:
        student: any of its quantized weights is computed once.
        teacher: the model it imitates.
        held_out: text that training never saw.
        top_k: tokens that `kd_loss` looks at, those the teacher finds likeliest.
        machine: compute type and micro-batch.

    Raises:
        NumericsError: a figure is not finite.
    """
    sums, positions = torch.zeros(5, dtype=torch.float64), 0
    tokens = held_out.rows * int(held_out.meta["length"])
    with baked(student, machine.dtype), progress("evaluation", tokens, "tokens") as advance:
        for rows in held_out.in_order(machine.micro_batch):
            batch = held_out.batch(rows).to(machine.device)
            counts = batch.loss_mask
            theirs, ours = (
                m.base_model(**batch.inputs()).last_hidden_state[:, :-1][counts] for m in (teacher, student)
            )
            for ours_XD, theirs_XD, next_X in position_chunks(ours, (theirs, batch.input_ids[:, 1:][counts])):
                sums += _compare(student.lm_head(ours_XD).float(), teacher.lm_head(theirs_XD).float(), next_X, top_k)
            positions += int(counts.sum())
            advance(batch.input_ids.numel())
    kl, kd, nll, teacher_nll, same = (sums / positions).tolist()
    if not math.isfinite(sum((kl, kd, nll, teacher_nll))):
        raise NumericsError(f"evaluation gave kl {kl}, kd_loss {kd}, loss {nll}: the checkpoint holds NaN or infinity")
    return Metrics(kl, kd, math.exp(nll), math.exp(teacher_nll), same)


def _compare(logits_XV: Tensor, teacher_XV: Tensor, next_X: Tensor, top_k: int) -> Tensor:
    """Sums [5] over some positions, in the order of `Metrics`, negative log-likelihoods for perplexities."""
    top, ids = teacher_XV.topk(top_k, dim=-1)
    values = (
        full_kl(logits_XV, teacher_XV),
        topk_kl(logits_XV.gather(-1, ids), top, KD_TEMPERATURE),
        torch.nn.functional.cross_entropy(logits_XV, next_X, reduction="none"),
        torch.nn.functional.cross_entropy(teacher_XV, next_X, reduction="none"),
        logits_XV.argmax(-1) == teacher_XV.argmax(-1),
    )
    return torch.stack([value.double().sum().cpu() for value in values])


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...],
    tokens: int,
    machine: Machine,
) -> list[str]:
    """The model's most likely answer to each prompt, up to `tokens` long."""
    asked = [chat_tokens(tokenizer, [{"role": "user", "content": prompt}], ask=True) for prompt in prompts]
    inputs = tokenizer.pad({"input_ids": asked}, return_tensors="pt").to(machine.device)
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with baked(model, machine.dtype):
        written = generate(model, inputs["input_ids"], settings, attention_mask=inputs["attention_mask"])
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
