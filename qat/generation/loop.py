"""The decoding loop of plain attention: prompts are read whole, then all rows go on token by token.

A step (one token of every row through the model, logits, choice, bookkeeping) reads and writes tensors
that stay in place and asks nothing of the host, so that on CUDA it is recorded once and replayed for every
token of every batch. The host looks only now and then whether all rows have ended. What chance decides is
drawn before the first token: a batch is the same whenever it is written.

Shapes: R rows, A tokens of an answer, L tokens of the longest prompt, D dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qat.console import Advance
from qat.forward import body, prepare, used
from qat.generation.memory import Memory, elements
from qat.generation.sampling import choose
from qat.graphs import Recorder, recording_stream
from qat.head import OutputHead

LOOK_EVERY = 16  # tokens between two checks whether all rows have ended
TOKENS_AT_ONCE = 65_536  # maximum prompt tokens, padding included, in one forward pass
ROUND = 64  # reserved positions are a multiple of this, so that few shapes are compiled
STEP = "step"  # key of a decoding step in the recorder
PROMPT_ROUND = 16  # tokens; longer prompts are padded to a multiple of it, shorter ones to a power of two
LOGITS_HELD = 4  # copies of a row's fp32 logits for which room is left


Watch = Callable[[Sequence[int], Tensor], None]  # takes row numbers and the fp32 logits of their next tokens


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        tokens: of the longest answer.
        greedy: first tokens, which are the most likely ones; the others are drawn.
        temperature: divides the logits of those that are drawn.
        ends: the tokens after which an answer is over; without any it has all its tokens.
    """

    tokens: int
    greedy: int
    temperature: float
    ends: tuple[int, ...]


def bytes_a_row(
    config: PreTrainedConfig, longest: int, sampling: Sampling, dtype: torch.dtype, logits: int = LOGITS_HELD
) -> int:
    """Memory for a row while it is written: keys and values of its positions, and copies of its logits."""
    text = config.get_text_config()
    held = elements(text) * _positions(longest, sampling) * dtype.itemsize
    return held + 4 * logits * int(text.vocab_size)


def _positions(longest: int, sampling: Sampling) -> int:
    return -(-(longest + sampling.tokens) // ROUND) * ROUND


class Writer:
    """Continues up to `rows` prompts at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        rows: int,
        longest: int,
        compiled: bool = False,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Reserves memory for answers to prompts of up to `longest` tokens.

        Args:
            model: a causal language model of transformers, without gradients.
            sampling: of every answer.
            rows: of a batch; a smaller batch takes as long.
            longest: tokens of a prompt.
            compiled: the decoder layers of a step are compiled.
            turn: entered while the model works. With a lock in it several threads may call a writer, or
                writers of one model: one has its turn while others prepare theirs or take up what they wrote.
        """
        self.model, self.sampling, self.compiled, self.turn = model, sampling, compiled, turn
        self.body, self.head = body(model), OutputHead(model)
        self.memory = Memory(model, rows, _positions(longest, sampling))
        self.uniform_AR = torch.zeros(sampling.tokens, rows, dtype=torch.float32, device=model.device)
        self.written_AR = torch.zeros(sampling.tokens, rows, dtype=torch.int32, device=model.device)
        self.token_R = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.ended_R = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self.ends_E = torch.tensor(sampling.ends, dtype=torch.long, device=model.device)
        self.step_1 = torch.zeros(1, dtype=torch.long, device=model.device)
        self.recorder = Recorder(recording_stream(model.device) if used(model).product else None)
        self.watch: Watch = overlook

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seed: int, advance: Advance) -> Tensor:
        """Answers [len(prompts), A], int32 in host memory: each up to its end token, or whole (`answers`).

        Args:
            prompts: token ids, at least one each.
            seed: of what is drawn.
            advance: told how many tokens came, those after an end included.
        """
        rows = len(self.token_R)
        ids_RL, lengths_R = _together(prompts + prompts[-1:] * (rows - len(prompts)))
        uniform_AR = drawn(self.sampling, rows, seed)
        with self.turn(), self._on_stream():
            self._begin(uniform_AR)
            self._read(ids_RL, lengths_R)
            self._follow(len(prompts), advance)
            written_AR = self.written_AR.to("cpu", copy=True)  # a copy: the next thread's turn overwrites the tensor
        return written_AR.T[: len(prompts)].contiguous()

    def _begin(self, uniform_AR: Tensor) -> None:
        self.uniform_AR.copy_(uniform_AR)
        for tensor in (self.step_1, self.ended_R):
            tensor.zero_()
        self.written_AR.fill_(next(iter(self.sampling.ends), 0))

    def _read(self, ids_RL: Tensor, lengths_R: Tensor) -> None:
        """Fills the memory with the prompts and chooses the first tokens."""
        device = self.model.device
        self.memory.position.copy_(lengths_R)
        last_RD = []
        size = max(1, TOKENS_AT_ONCE // ids_RL.shape[1])
        for first in range(0, len(ids_RL), size):
            part = slice(first, min(first + size, len(ids_RL)))
            with self.memory.filling(part.start, part.stop):
                hidden_RLD = self.body(input_ids=ids_RL[part].to(device), use_cache=False)[0]
            places = torch.arange(len(hidden_RLD), device=device), self.memory.position[part] - 1
            last_RD.append(hidden_RLD[places])
        self._choose(torch.cat(last_RD))

    def _follow(self, asked: int, advance: Advance) -> None:
        """All further tokens."""
        done = 1
        with self._prepared(), self.memory.decoding():
            while done < self.sampling.tokens and not self.ended_R.all():
                count = min(LOOK_EVERY, self.sampling.tokens - done)
                for _ in range(count):
                    self.recorder(STEP, self._step)
                done += count
                advance(count * asked)
        advance((self.sampling.tokens - done + 1) * asked)

    def _step(self) -> None:
        """One token more in every row."""
        ids_R1, places_R1 = self.token_R[:, None], self.memory.position[:, None]
        hidden_R1D = self.body(input_ids=ids_R1, position_ids=places_R1, use_cache=False)[0]
        self.memory.position.add_(1).masked_fill_(self.ended_R, 0)  # what comes after an end need not look back
        self._choose(hidden_R1D[:, 0])

    def _choose(self, hidden_RD: Tensor) -> None:
        uniform_R = self.uniform_AR.index_select(0, self.step_1)[0]
        logits_RV = self.head.logits(hidden_RD)
        self.watch(range(len(logits_RV)), logits_RV)
        self.token_R.copy_(choose(logits_RV, uniform_R, self.sampling.temperature))
        self.written_AR.index_copy_(0, self.step_1, self.token_R[None].int())
        self.ended_R |= (self.token_R[:, None] == self.ends_E).any(1)
        self.step_1 += 1

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Inside, the model is compiled where steps are to be; one that is recorded does without the model.

        Prompts have too many shapes for compiling to pay.
        """
        needed = self.compiled and not self.recorder.recorded(STEP)
        if needed:
            prepare(self.model, True)
        try:
            yield
        finally:
            if needed:
                prepare(self.model, False)

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


def drawn(sampling: Sampling, rows: int, seed: int) -> Tensor:
    """Where in the cumulative distribution each token [A, R] lies; below 0 it is the most likely one."""
    draw = torch.Generator().manual_seed(seed)
    uniform_AR = torch.rand((sampling.tokens, rows), generator=draw, dtype=torch.float32)
    uniform_AR[: sampling.greedy] = -1
    return uniform_AR


def overlook(rows: Sequence[int], logits_RV: Tensor) -> None:
    """A `Watch` that does nothing."""


def answers(written_RA: Tensor, ends: tuple[int, ...]) -> list[list[int]]:
    """The tokens of each row, up to the first that is one of `ends`."""
    ended_RA = np.isin(written_RA.numpy(), ends)
    lengths_R = np.where(ended_RA.any(1), ended_RA.argmax(1) + 1, written_RA.shape[1])
    # NumPy converts to Python numbers ten times as fast as PyTorch.
    return [row[:length] for row, length in zip(written_RA.numpy().tolist(), lengths_R, strict=True)]


def _together(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor [R, L], each filled up with its last token, and their lengths [R]."""
    lengths_R = torch.tensor([len(prompt) for prompt in prompts])
    longest = _rounded(int(lengths_R.max()))
    return torch.from_numpy(np.array([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])), lengths_R


def _rounded(length: int) -> int:
    """The length padded to one of a few values, since kernels are compiled for each."""
    if length <= PROMPT_ROUND:
        return 1 << (length - 1).bit_length()
    return -(-length // PROMPT_ROUND) * PROMPT_ROUND
