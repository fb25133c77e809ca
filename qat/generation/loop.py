"""The decoding loop of plain attention: prompts are read whole, then all rows go on token by token.

A step (one token of every row through the model, logits, choice, bookkeeping) reads and writes tensors
that stay in place and asks nothing of the host, so that on CUDA it is recorded once and replayed for every
token of every batch. The host looks only now and then which rows have ended, and gives them the next prompts
once they are an eighth of all, as in Orca (Yu et al. 2022, section 3.1, there after every token): texts differ
in length, and a row that waits for the longest of them costs as much as one that is written. What chance decides
is drawn before the first token, for each text: a batch is the same whenever it is written.

Shapes: R rows, E some of them, N texts of a batch, A tokens of an answer, L tokens of the longest prompt, D
dimensions, V tokens.
"""

from collections.abc import Callable, Iterator
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

TEXTS_A_ROW = 4  # maximum texts of a batch over its rows: the last ones of a batch leave rows empty
LOOK_EVERY = 16  # tokens between two looks at which rows have ended; on a processor one, as a look costs nothing
REFILL = 8  # a part of 1 / REFILL of the rows has ended before prompts are read into them
TOKENS_AT_ONCE = 65_536  # maximum prompt tokens, padding included, in one forward pass
ROUND = 64  # reserved positions are a multiple of this, so that few shapes are compiled
STEP = "step"  # key of a decoding step in the recorder
PROMPT_ROUND = 16  # tokens; longer prompts are padded to a multiple of it, shorter ones to a power of two
LOGITS_HELD = 4  # copies of a row's fp32 logits for which room is left


Watch = Callable[[Tensor, Tensor], None]  # takes numbers of texts and the fp32 logits of their next tokens


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
    """Memory for a row while it is written: keys and values of its positions, its texts, and copies of its logits."""
    text = config.get_text_config()
    held = elements(text) * _positions(longest, sampling) * dtype.itemsize
    texts = TEXTS_A_ROW * sampling.tokens * (torch.float32.itemsize + torch.int32.itemsize)
    return held + texts + 4 * logits * int(text.vocab_size)


def _positions(longest: int, sampling: Sampling) -> int:
    return -(-(longest + sampling.tokens) // ROUND) * ROUND


class Writer:
    """Continues prompts, up to `rows` of them at once."""

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
            rows: written at once; fewer take as long.
            longest: tokens of a prompt.
            compiled: the decoder layers of a step are compiled.
            turn: entered while the model works. With a lock in it several threads may call a writer, or
                writers of one model: one has its turn while others prepare theirs or take up what they wrote.
        """
        self.model, self.sampling, self.rows, self.compiled, self.turn = model, sampling, rows, compiled, turn
        self.body, self.head = body(model), OutputHead(model)
        self.memory = Memory(model, rows, _positions(longest, sampling))
        self.nobody = TEXTS_A_ROW * rows  # the text of an empty row, whose tokens nobody takes
        device, kept = model.device, (self.nobody + 1, sampling.tokens)
        self.uniform_NA = torch.zeros(kept, dtype=torch.float32, device=device)
        self.written_NA = torch.zeros(kept, dtype=torch.int32, device=device)
        self.text_R, self.step_R, self.token_R = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.all_R = torch.arange(rows, device=device)
        self.ends_E = torch.tensor(sampling.ends, dtype=torch.long, device=device)
        self.recorder = Recorder(recording_stream(device) if used(model).product else None)
        self.watch: Watch = overlook

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seed: int, advance: Advance) -> Tensor:
        """Answers [len(prompts), A], int32 in host memory: each up to its end token, or whole (`answers`).

        Args:
            prompts: token ids, at least one each; at most `TEXTS_A_ROW` prompts a row.
            seed: of what is drawn.
            advance: told how many tokens came; an answer that ends early counts as a whole one.

        Raises:
            ValueError: there are more prompts.
        """
        if len(prompts) > self.nobody:
            raise ValueError(f"{len(prompts)} prompts for {self.rows} rows, which take at most {self.nobody} in all")
        uniform_NA = drawn(self.sampling, len(prompts), seed)
        with self.turn(), self._on_stream():
            self._begin(uniform_NA)
            self._write(prompts, advance)
            return self.written_NA[: len(prompts)].to("cpu", copy=True)  # the next thread's turn overwrites the tensor

    def _begin(self, uniform_NA: Tensor) -> None:
        self.uniform_NA[: len(uniform_NA)] = uniform_NA.to(self.uniform_NA.device)
        self.written_NA.fill_(next(iter(self.sampling.ends), 0))
        self.text_R.fill_(self.nobody)
        for tensor in (self.step_R, self.memory.position):
            tensor.zero_()

    def _write(self, prompts: list[list[int]], advance: Advance) -> None:
        """All texts: prompts are read into rows that are empty, and all rows go on by some tokens, again and again."""
        taken = told = left = 0
        empty_E, every = self.all_R, 1 if self.model.device.type == "cpu" else LOOK_EVERY
        while taken < len(prompts) or len(empty_E) < self.rows:
            if taken < len(prompts) and len(empty_E) * REFILL >= self.rows:
                asked = prompts[taken : taken + len(empty_E)]
                self._read(asked, empty_E[: len(asked)], taken)
                taken, left = taken + len(asked), self.sampling.tokens - 1  # after so many steps all rows are empty
            count = min(every, left)
            self._follow(count)
            left -= count
            empty_E = (self.text_R == self.nobody).nonzero()[:, 0]
            over = taken - (self.rows - len(empty_E))
            came = over * self.sampling.tokens + int(self.step_R.sum())
            advance(came - told)
            told = came

    def _read(self, prompts: list[list[int]], rows_E: Tensor, first: int) -> None:
        """Fills rows of the memory with prompts, the texts from `first` on, and chooses their first tokens."""
        ids_EL, lengths_E = (x.to(self.model.device) for x in _together(prompts))
        self.text_R[rows_E] = torch.arange(first, first + len(prompts), device=rows_E.device)
        self.memory.position[rows_E] = lengths_E
        for part in torch.arange(len(prompts), device=rows_E.device).split(max(1, TOKENS_AT_ONCE // ids_EL.shape[1])):
            with self.memory.filling(rows_E[part]):
                hidden_ELD = self.body(input_ids=ids_EL[part], use_cache=False)[0]
            self._choose(hidden_ELD[torch.arange(len(part), device=part.device), lengths_E[part] - 1], rows_E[part])

    def _follow(self, count: int) -> None:
        """So many tokens more."""
        with self._prepared(), self.memory.decoding():
            for _ in range(count):
                self.recorder(STEP, self._step)

    def _step(self) -> None:
        """One token more in every row."""
        ids_R1, places_R1 = self.token_R[:, None], self.memory.position[:, None]
        hidden_R1D = self.body(input_ids=ids_R1, position_ids=places_R1, use_cache=False)[0]
        self.memory.position.add_(1)
        self._choose(hidden_R1D[:, 0], self.all_R)

    def _choose(self, hidden_ED: Tensor, rows_E: Tensor) -> None:
        """The next token of some rows; one whose text is over is empty, and does not look back."""
        text_E, step_E = self.text_R[rows_E], self.step_R[rows_E]
        place_E = text_E * self.sampling.tokens + step_E
        logits_EV = self.head.logits(hidden_ED)
        self.watch(text_E, logits_EV)
        token_E = choose(logits_EV, self.uniform_NA.view(-1)[place_E], self.sampling.temperature)
        self.written_NA.view(-1)[place_E] = token_E.int()
        over_E = (token_E[:, None] == self.ends_E).any(1) | (step_E + 1 == self.sampling.tokens)
        over_E |= text_E == self.nobody
        self.token_R[rows_E] = token_E
        self.text_R[rows_E] = text_E.masked_fill(over_E, self.nobody)
        self.step_R[rows_E] = (step_E + 1).masked_fill(over_E, 0)
        self.memory.position[rows_E] = self.memory.position[rows_E].masked_fill(over_E, 0)

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


def drawn(sampling: Sampling, texts: int, seed: int) -> Tensor:
    """Where in the cumulative distribution each token [N, A] lies; below 0 it is the most likely one."""
    draw = torch.Generator().manual_seed(seed)
    uniform_NA = torch.rand((texts, sampling.tokens), generator=draw, dtype=torch.float32)
    uniform_NA[:, : sampling.greedy] = -1
    return uniform_NA


def overlook(texts_E: Tensor, logits_EV: Tensor) -> None:
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
