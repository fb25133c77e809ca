"""The decoding loop: prompts are read whole, then all rows go on token by token.

A step (one token of every row through the model, logits, choice, bookkeeping) reads and writes tensors
that stay in place and asks nothing of the host, so that on CUDA it is recorded once and replayed for every
token of every batch. The host looks only now and then whether all rows have ended. What chance decides is
drawn before the first token: a batch is the same whenever it is written.

Shapes: R rows, A tokens of an answer, L tokens of the longest prompt, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qat.console import Advance
from qat.forward import prepare
from qat.generation.memory import Memory, elements
from qat.generation.sampling import choose
from qat.graphs import Recorder, recording_stream
from qat.machine import widened

LOOK_EVERY = 16  # tokens between two looks at whether all rows have ended
TOKENS_AT_ONCE = 65_536  # of prompts
ROUND = 64  # positions are reserved by; of few shapes, few are compiled
LOGITS_HELD = 4  # rows of fp32 logits a row: those of plain calls, of the recording, and what a choice needs


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        tokens: of the longest answer.
        greedy: first tokens, which are the most likely ones; the others are drawn.
        temperature: divides the logits of those that are drawn.
        end: the token after which an answer ends.
    """

    tokens: int
    greedy: int
    temperature: float
    end: int


def bytes_a_row(config: PreTrainedConfig, longest: int, sampling: Sampling, dtype: torch.dtype) -> int:
    """Memory that a row takes while it is written: keys and values of its positions, and logits."""
    text = config.get_text_config()
    held = elements(text) * _positions(longest, sampling) * dtype.itemsize
    return held + 4 * LOGITS_HELD * int(text.vocab_size)


def _positions(longest: int, sampling: Sampling) -> int:
    return -(-(longest + sampling.tokens) // ROUND) * ROUND


class Writer:
    """Goes on from up to `rows` prompts at once."""

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, rows: int, longest: int, compiled: bool = False
    ) -> None:
        """Reserves memory for answers to prompts of up to `longest` tokens.

        Args:
            model: a causal language model of transformers, without gradients.
            sampling: of every answer.
            rows: of a batch; a smaller batch takes as long.
            longest: tokens of a prompt.
            compiled: the decoder layers of a step are compiled.

        Raises:
            ConfigError: the model remembers what it read by other means than plain attention.
        """
        self.model, self.sampling, self.compiled = model, sampling, compiled
        self.head: Tensor = model.get_output_embeddings().weight
        self.memory = Memory(model, rows, _positions(longest, sampling))
        self.uniform_AR = torch.zeros(sampling.tokens, rows, device=model.device)
        self.written_AR = torch.zeros(sampling.tokens, rows, dtype=torch.long, device=model.device)
        self.token_R = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.ended_R = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self.step_1 = torch.zeros(1, dtype=torch.long, device=model.device)
        self.recorder = Recorder(recording_stream(model.device))

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seed: int, advance: Advance) -> list[list[int]]:
        """An answer to each prompt: it ends with the end token or at its longest.

        Args:
            prompts: token ids, at least one each.
            seed: of what is drawn.
            advance: told how many tokens came, those after an end included.
        """
        rows = len(self.token_R)
        with self._on_stream():
            self._begin(seed)
            self._read(prompts + prompts[-1:] * (rows - len(prompts)))
            self._follow(len(prompts), advance)
            written_RA = self.written_AR.T[: len(prompts)].tolist()
        return [_until(self.sampling.end, row) for row in written_RA]

    def _begin(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.uniform_AR.copy_(torch.rand(self.uniform_AR.shape, generator=draw))
        self.uniform_AR[: self.sampling.greedy] = -1  # the most likely token
        for tensor in (self.step_1, self.ended_R):
            tensor.zero_()
        self.written_AR.fill_(self.sampling.end)

    def _read(self, prompts: list[list[int]]) -> None:
        """Fills the memory with the prompts and chooses the first tokens."""
        lengths_R = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths_R.max())
        ids_RL = torch.tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])
        device, base = self.model.device, self._base()
        self.memory.position.copy_(lengths_R)
        last_RD = []
        prepare(self.model, False)  # prompts have a new shape in every batch, for which compiling is slow
        size = max(1, TOKENS_AT_ONCE // longest)
        for first in range(0, len(prompts), size):
            part = slice(first, min(first + size, len(prompts)))
            with self.memory.filling(part.start, part.stop):
                hidden_RLD = base(input_ids=ids_RL[part].to(device), use_cache=False).last_hidden_state
            places = torch.arange(len(hidden_RLD), device=device), lengths_R[part].to(device) - 1
            last_RD.append(hidden_RLD[places])
        self._choose(torch.cat(last_RD))

    def _follow(self, asked: int, advance: Advance) -> None:
        """All further tokens."""
        prepare(self.model, self.compiled)
        done = 1
        with self.memory.decoding():
            while done < self.sampling.tokens and not self.ended_R.all():
                count = min(LOOK_EVERY, self.sampling.tokens - done)
                for _ in range(count):
                    self.recorder("step", self._step)
                done += count
                advance(count * asked)
        advance((self.sampling.tokens - done + 1) * asked)

    def _step(self) -> None:
        """One token more in every row."""
        ids_R1, places_R1 = self.token_R[:, None], self.memory.position[:, None]
        hidden_R1D = self._base()(input_ids=ids_R1, position_ids=places_R1, use_cache=False).last_hidden_state
        self.memory.position += 1
        self._choose(hidden_R1D[:, 0])

    def _choose(self, hidden_RD: Tensor) -> None:
        uniform_R = self.uniform_AR.index_select(0, self.step_1)[0]
        self.token_R.copy_(choose(widened(hidden_RD, self.head), uniform_R, self.sampling.temperature))
        self.written_AR.index_copy_(0, self.step_1, self.token_R[None])
        self.ended_R |= self.token_R == self.sampling.end
        self.step_1 += 1

    def _base(self) -> Any:
        return self.model.base_model

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        stream = self.recorder.stream
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def _until(end: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
