"""The teacher writes its own training text.

A student that imitates its teacher learns best where the teacher itself goes. As in LLM-QAT (Liu et
al. 2023, section 3.1) the first tokens of an answer are chosen greedily, which keeps it to the
point, and the rest is sampled, which keeps it varied. With `start=questions` the teacher writes the
questions as well: behind the chat template's opening of a user turn it goes on as a user would
(Magpie, Xu et al. 2024, arXiv 2406.08464).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from threading import Event, Lock

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.artifacts import content_key, write_bytes
from qat.config import DataConfig, Start
from qat.console import progress
from qat.data import starts
from qat.data.thinking import user_turn
from qat.errors import ConfigError
from qat.generation import OwnWriter, Sampling, Writer, answers, rows, writer
from qat.machine import Machine
from qat.models import ModelFolder
from qat.seeds import mixed
from qat.shaping import shaping
from qat.threads import beside

ANSWERS = ".answers-"
AHEAD = 2  # batches of a writer in progress: one on the GPU while another is prepared or stored
# Held by the source that uses the GPU: sources of a mixture take turns, as a GPU records for one at a time.
WRITING = Lock()


def answer(
    teacher: ModelFolder, data: DataConfig, seed: int, machine: Machine, scratch: Path
) -> Generator[tuple[str, list[int]], None, None]:
    """Lets the teacher write from every start, `data.answers` times.

    Answers are kept in `scratch` batch by batch, and those that are there already are not written
    again. Each batch has a seed of its own, so it does not matter when it is written.

    Yields:
        The origin and the tokens of the whole text, end marker included where one came.
    """
    tokenizer, author = teacher.tokenizer(), _Author(teacher, data, machine, scratch)
    ends = teacher.ends()
    sampling = Sampling(data.answer_tokens, data.greedy_tokens, data.temperature, ends)
    if data.start is Start.questions:
        opening, end = user_turn(tokenizer)
        of_turn = (end, *(other for other in ends if other != end))
        as_user = Sampling(data.answer_tokens, 0, data.temperature, of_turn)
        turns = author.write("teacher questions", [opening] * (data.documents or 0), as_user, mixed(seed, -1))
        asked = starts.asked(tokenizer, data, starts.questions(tokenizer, list(turns)))
    else:
        asked = starts.starts(tokenizer, data, seed)
    asked *= data.answers
    asked.sort(key=lambda item: len(item[1]))  # texts of equal length together need less padding
    what = "teacher answers" if data.start in (Start.prompts, Start.questions) else "teacher text"
    with closing(author.write(what, [ids for _, ids in asked], sampling, seed)) as replies:
        for (origin, ids), reply in zip(asked, replies, strict=True):
            yield origin, ids + reply


class _Author:
    """Lets the teacher write answers, and keeps them in a folder batch by batch."""

    def __init__(self, teacher: ModelFolder, data: DataConfig, machine: Machine, scratch: Path) -> None:
        self.teacher, self.data, self.machine, self.scratch = teacher, data, machine, scratch

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded when the first batch is missing, once for all sources that write."""
        return self.teacher.shared(self.machine.dtype, self.machine.device)

    def write(
        self, what: str, prompts: list[list[int]], sampling: Sampling, seed: int
    ) -> Generator[list[int], None, None]:
        """What follows each prompt, in order."""
        if not prompts:
            return
        plan = self._plan(prompts, sampling, seed)
        total, there = (count * sampling.tokens for count in (len(prompts), len(prompts) - plan.missing()))
        with progress(what, total, "tokens", there) as advance, _ahead(self.machine.device) as (submit, go_on):

            @contextmanager
            def turn() -> Iterator[None]:
                with WRITING:
                    go_on()
                    yield

            def report(amount: float = 1, note: str = "") -> None:
                go_on()
                advance(amount, note)

            @cache
            def loop() -> Writer | OwnWriter:
                return writer(self.teacher, self.model, prompts, sampling, plan.rows, plan.compiled, turn)

            def make(number: int) -> Tensor:
                """The tokens of one batch [texts, A], int32."""
                file = plan.files[number]
                if file.exists():
                    return safetensors.torch.load_file(file)["tokens"]
                with turn():
                    write = loop()
                written_NA = write(plan.batches[number], mixed(seed, number), report)
                write_bytes(file, safetensors.torch.save({"tokens": written_NA}))
                return written_NA

            for written_NA in _in_order(submit, make, len(plan.batches)):
                yield from answers(written_NA, sampling.ends)

    def _plan(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> "_Plan":
        longest = max(map(len, prompts))
        self._check_context(longest + sampling.tokens)
        how = rows.batches(self.teacher.settings(), self.machine, len(prompts), longest, sampling)
        batches = [prompts[first : first + how.texts] for first in range(0, len(prompts), how.texts)]
        # The name depends on machine and prompts, so that files of another machine or other prompts are not used.
        machine = [self.machine.describe(), torch.__version__, how.compiled]
        who = content_key([machine, prompts, seed, how.rows, how.texts, shaping(self.data)])
        files = [self.scratch / f"{ANSWERS}{who}-{number:05d}.safetensors" for number in range(len(batches))]
        return _Plan(batches, files, how.rows, how.compiled)

    def _check_context(self, tokens: int) -> None:
        """Refuses texts that are longer than what the teacher was made to see at once."""
        context = self.teacher.context()
        if context is not None and tokens > context:
            raise ConfigError(
                f"data.answer_tokens={self.data.answer_tokens} and what comes before make texts of {tokens} tokens, and"
                f" {self.teacher.name} is made for at most {context}: ask for fewer"
            )


@dataclass(frozen=True)
class _Plan:
    """Prompts in batches, where the answers to each are kept, and how they are written."""

    batches: list[list[list[int]]]
    files: list[Path]
    rows: int
    compiled: bool

    def missing(self) -> int:
        """Prompts whose answers are not there."""
        return sum(len(batch) for batch, file in zip(self.batches, self.files, strict=True) if not file.exists())


def _in_order(
    submit: Callable[..., Future[Tensor]], make: Callable[[int], Tensor], count: int
) -> Generator[Tensor, None, None]:
    """Results for the numbers below `count`, in order; some are computed ahead."""
    coming: deque[Future[Tensor]] = deque()
    for number in range(count):
        coming.append(submit(make, number))
        if len(coming) > AHEAD:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


@contextmanager
def _ahead(device: torch.device) -> Iterator[tuple[Callable[..., Future[Tensor]], Callable[[], None]]]:
    """Threads for the next batches, while the one before is taken; on a processor each waits for its turn.

    Gives how to hand it work, and what the work calls now and then: that ends it where nobody takes it any more.
    """
    left = Event()

    def go_on() -> None:
        if left.is_set():
            raise CancelledError

    with beside(device, AHEAD, "teacher") as pool:
        try:
            yield pool.submit, go_on
        finally:
            left.set()
            pool.shutdown(cancel_futures=True)  # this waits for running work, so that nothing is stored afterwards
