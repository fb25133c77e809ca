"""Answers of models: the same prompts answered by each, and streams that show an answer while it is written."""

from typing import TextIO

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qat.data.asking import asked, begun, takes_questions
from qat.forward import trying
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

SAMPLE_OPENINGS = (
    "The capital of France is",
    "The sky is blue because",
    "The sea was calm that morning, and",
    "Three tips for sleeping better:",
    "The year has twelve months:",
)

ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 5e-3}  # maximum rounding error of logits, relative to their norm

UNFINISHED = "�"  # character that an incomplete UTF-8 sequence decodes to
CHARACTER = 4  # maximum bytes, and so maximum tokens, of one character


def samples_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The sample prompts as token ids; beginnings of text where no chat template takes a question."""
    if takes_questions(tokenizer):
        return {text: asked(tokenizer, text) for text in SAMPLE_PROMPTS}
    return {text: begun(tokenizer, text) for text in SAMPLE_OPENINGS}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    ends: tuple[int, ...],
    tokens: int,
    machine: Machine,
) -> list[str]:
    """What the model most likely writes after each prompt, up to `tokens` long and to the first of `ends`.

    Of a model that cannot write: why it cannot.
    """
    settings = settings_of(tokenizer, ends, tokens)
    with baked(model, machine.dtype), trying() as failed:
        written = [row for batch in _batches(model, tokenizer, prompts) for row in _write(model, *batch, settings)]
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [f"(it cannot write text: {failed[0]})"] * len(prompts)


def _write(model: PreTrainedModel, ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    return generate(model, ids, settings, attention_mask=mask)


@torch.inference_mode()
def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and attention masks of all prompts together if padding in front changes nothing, else of each alone."""
    alone = [torch.tensor([ids], device=model.device) for ids in prompts]
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    mask = padded["attention_mask"]
    with trying():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        together = model(padded["input_ids"], attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]
        apart = torch.cat([model(ids, use_cache=False).logits[:, -1] for ids in alone])
        if (together - apart).norm() <= ROUNDING.get(model.dtype, 1e-3) * apart.norm():
            return [(padded["input_ids"], mask)]
    return [(ids, torch.ones_like(ids)) for ids in alone]


def settings_of(
    tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Settings to generate at most `tokens` tokens, up to the first of `ends`; greedy if the temperature is 0."""
    sampling = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=bool(sampling),
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


class Stream(BaseStreamer):
    """Writes an answer token by token; transformers' own streamer waits for the end of each word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO) -> None:
        self._tokenizer, self._file = tokenizer, file
        self._ids: list[int] = []
        self._before, self._shown = 0, 0  # where the last piece begins, and how many tokens are written
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the next token; the first call gives the prompt."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._write(final=False)

    def end(self) -> None:
        """Writes what is left, and ends the line."""
        self._write(final=True)
        self._file.write("\n")
        self._file.flush()

    def _write(self, final: bool) -> None:
        # The piece before is decoded again, because a tokenizer may join the next token to it without a space.
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if not final and text.endswith(UNFINISHED) and len(self._ids) - self._shown < CHARACTER:
            return
        self._file.write(text[len(known) :])
        self._file.flush()
        self._before, self._shown = self._shown, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[int],
    settings: GenerationConfig,
    file: TextIO,
) -> str:
    """Writes the answer to a prompt's tokens as it comes, and returns it."""
    asked_BT = torch.tensor([asked], device=model.device)
    written = generate(
        model, asked_BT, settings, attention_mask=torch.ones_like(asked_BT), streamer=Stream(tokenizer, file)
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
