"""The text that the teacher is recorded on."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from qat.config.keys import COLD, HOT, key, like


class DataSource(Enum):
    """Where the cached text comes from."""

    selfgen = "what the teacher writes, as data.start says"
    alpaca = "instruction rows, of files or a hub data set"
    chat_jsonl = "conversations, or questions with answers, a row each"
    text = "plain text, or the texts of rows"
    mix = "several sources by weight, data.parts"

    @property
    def plain(self) -> bool:
        """Whether text is learned from as it stands in files, without a chat template."""
        return self not in (DataSource.selfgen, DataSource.alpaca, DataSource.chat_jsonl, DataSource.mix)


class Start(Enum):
    """What the teacher begins to write from, for selfgen."""

    prompts = "answers to a list of questions"
    tokens = "anything, after each of many first tokens"
    openings = "how passages of a text go on, after some first tokens of each"
    questions = "answers to questions that the teacher writes itself, as a user"


@dataclass
class DataConfig:
    """The text that is cached."""

    name: str = MISSING
    source: DataSource = MISSING
    path: Any = key(None, "a file, folder, glob or a list of them; for selfgen, of prompts or of text for openings")
    repo: str | None = key(None, "a hub data set, owner/name, where there is no path")
    revision: str | None = key(None, "of the data set: branch, tag or commit")
    thinking: str = key("false", "the chat template's own switch", words=("false", "true", "both"))
    documents: int | None = key(
        None, "at most so many documents (starts, of a single selfgen source); null takes all", low=1
    )
    start: Start = key(Start.prompts, "selfgen: from prompts, first tokens, openings of a text, or own questions")
    answers: int = key(1, "selfgen: answers to each start", low=1)
    answer_tokens: int = key(80, "selfgen: longest answer; openings: tokens between two of a text", low=1)
    greedy_tokens: int = key(4, "selfgen: first tokens chosen greedily, the rest sampled", low=0)
    temperature: float = key(1.0, "selfgen: of the sampled tokens", low=COLD, high=HOT)
    seed: int = key(
        0, "of what the teacher writes: another one is another text, also to be measured on", low=0, high=2**32 - 1
    )
    eval_fraction: float = key(0.125, "share of documents held apart for evaluation", above=0, below=1)
    parts: "list[DataPart]" = key([], "mix: the sources, each {source, weight, path, ...}")


@dataclass
class DataPart:
    """One source of a mixture; what it does not say is as `data` has it."""

    source: DataSource = MISSING
    weight: float = key(1.0, "tokens of this source, relative to the others", above=0)
    path: Any = like(DataConfig, "path")
    repo: str | None = like(DataConfig, "repo")
    revision: str | None = like(DataConfig, "revision")
    thinking: str | None = like(DataConfig, "thinking")
    documents: int | None = like(DataConfig, "documents")
    start: Start = like(DataConfig, "start", Start.prompts)
    answers: int | None = like(DataConfig, "answers")
    answer_tokens: int | None = like(DataConfig, "answer_tokens")
    greedy_tokens: int | None = like(DataConfig, "greedy_tokens")
    temperature: float | None = like(DataConfig, "temperature")
