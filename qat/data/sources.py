"""Text that already exists: prompt lists, Alpaca rows, conversations, plain files; streamed, never held whole."""

import hashlib
import importlib.resources
from collections.abc import Generator, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig, DataSource, Start
from qat.data import files
from qat.data.files import TextFile
from qat.data.thinking import Messages, renderings
from qat.errors import ConfigError

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def prompts(data: DataConfig) -> list[str]:
    """The questions that the teacher answers: `data.path`, one a line, or the project's own list."""
    lines = [line for file in files.find(data) for line in files.lines(file)] if data.path else _own_prompts()
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"data.path={data.path} holds no prompt: write one a line")
    return found


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source text, so that an edited file is a different data set."""
    if data.source is DataSource.selfgen and data.start is not Start.openings and not data.path:
        own = "\n".join(_own_prompts()) if data.start is Start.prompts else ""
        return hashlib.sha256(own.encode()).hexdigest()
    return files.content_hash(data)


def render(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Generator[tuple[str, list[int]], None, None]:
    """Origin and tokens of every document of an existing text."""
    if data.source is DataSource.text:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        yield from ((origin, [*ids, *end]) for origin, ids in plain(data, tokenizer))
        return
    conversations = _alpaca if data.source is DataSource.alpaca else _conversations
    for messages in (messages for file in files.find(data) for messages in conversations(file)):
        for tokens in renderings(tokenizer, messages, data.thinking):
            yield _question(messages), tokens


def plain(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Origin and tokens of every document of plain text."""
    for text in (text for file in files.find(data) for text in _texts(file)):
        yield text[:200], list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _own_prompts() -> list[str]:
    return importlib.resources.files("qat.data").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def _texts(file: TextFile) -> Iterator[str]:
    """Documents of a text file: the `text` (Alpaca: `output`) of every row, or what blank lines separate."""
    if file.name.endswith((".json", ".jsonl", ".parquet")):
        found = (row.get("text") or row.get("output") for row in files.rows(file))
        yield from (str(text) for text in found if text)
        return
    paragraph: list[str] = []
    for line in files.lines(file):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def _alpaca(file: TextFile) -> Iterator[Messages]:
    try:
        for row in files.rows(file):
            question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
            if not (isinstance(question, str) and isinstance(row["output"], str)):
                raise TypeError("a value is not text")
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"data.path={file.name} is not a JSON list of rows with instruction, input and output ({error!r})"
        ) from None


def _conversations(file: TextFile) -> Iterator[Messages]:
    for row in files.rows(file):
        turns = row.get("messages") or row.get("conversations")
        if not turns:
            raise ConfigError(f"data.path={file.name}: a line has neither messages nor conversations")
        try:
            yield [_turn(turn) for turn in turns]
        except (KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"data.path={file.name}: a turn has no usable {error} (ShareGPT or messages)") from None


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """A turn of either form; its text may be empty, as system messages are at times."""
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise KeyError("content")
    return {"role": ROLES[turn.get("role") or turn["from"]], "content": content}


def _question(messages: Messages) -> str:
    """What the user asked first: a system message is often the same in every conversation."""
    return next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
