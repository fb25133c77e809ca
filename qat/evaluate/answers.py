"""What models say: the same prompts answered by each, and answers that appear while they are written."""

from typing import TextIO

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qat.data.asking import asked, begun, takes_questions
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

UNFINISHED = "�"  # what bytes decode to that are no whole character
CHARACTER = 4  # most bytes, so most tokens, of one


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
    """What the model most likely writes after each prompt, up to `tokens` long and to the first of `ends`."""
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(machine.device)
    with baked(model, machine.dtype):
        settings = settings_of(tokenizer, ends, tokens)
        written = generate(model, inputs["input_ids"], settings, attention_mask=inputs["attention_mask"])
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def settings_of(
    tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Generation of at most so many tokens, up to the first of `ends`; the likeliest, unless there is a temperature."""
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
        self._before, self._shown = 0, 0  # tokens of the last piece, and all that were written
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
        # The piece before is decoded again: a tokenizer may join what follows to it without a space.
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
