"""Text that already exists: prompt lists, Alpaca rows, conversations, plain files."""

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig, DataSource
from qat.errors import ConfigError, MissingError

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def prompts(data: DataConfig) -> list[str]:
    """The questions that the teacher answers: `data.path`, one a line, or the project's own list."""
    lines = _text(data).splitlines()
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"data.path={data.path} holds no prompt: write one a line")
    return found


def content_hash(data: DataConfig) -> str:
    """SHA-256 of the source text, so that an edited file is a different data set."""
    return hashlib.sha256(_text(data).encode()).hexdigest()


def render(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Origin and tokens of every document of an existing text."""
    if data.source is DataSource.text:
        for paragraph in _paragraphs(_text(data), str(data.path)):
            ids = tokenizer(paragraph, add_special_tokens=False)["input_ids"]
            yield paragraph[:200], [*ids, tokenizer.eos_token_id]
        return
    conversations = _alpaca(data) if data.source is DataSource.alpaca else _conversations(data)
    for messages in conversations:
        yield _question(messages), chat_tokens(tokenizer, messages, data.thinking)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    thinking: str = "false",
    ask: bool = False,
) -> list[int]:
    """A conversation through the tokenizer's own chat template; with `ask`, up to where the answer begins."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=ask, enable_thinking=thinking == "true", return_dict=True
    )
    return list(encoded["input_ids"])


def _text(data: DataConfig) -> str:
    if data.path is None:
        if data.source is DataSource.selfgen:
            return importlib.resources.files("qat.data").joinpath("prompts.txt").read_text(encoding="utf-8")
        raise ConfigError(f"data={data.name} needs data.path=<file>: hub data sets are not read by this version")
    path = Path(data.path).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(f"data.path={path} cannot be read as UTF-8 text ({error})") from None


def _paragraphs(text: str, path: str) -> list[str]:
    """Documents of a text file: the `text` of every JSON line, or what blank lines separate."""
    if path.endswith(".jsonl"):
        return [str(row["text"]) for row in _json_lines(text, path) if row.get("text")]
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _alpaca(data: DataConfig) -> Iterator[list[dict[str, str]]]:
    try:
        rows = json.loads(_text(data))
        for row in rows:
            question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"data.path={data.path} is not a JSON list of rows with instruction, input and output ({error!r})"
        ) from None


def _conversations(data: DataConfig) -> Iterator[list[dict[str, str]]]:
    for row in _json_lines(_text(data), str(data.path)):
        turns = row.get("messages") or row.get("conversations")
        if not turns:
            raise ConfigError(f"data.path={data.path}: a line has neither messages nor conversations")
        try:
            yield [_turn(turn) for turn in turns]
        except (KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"data.path={data.path}: a turn has no usable {error} (ShareGPT or messages)") from None


def _turn(turn: dict[str, str]) -> dict[str, str]:
    """A turn of either form; its text may be empty, as system messages are at times."""
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise KeyError("content")
    return {"role": ROLES[turn.get("role") or turn["from"]], "content": content}


def _question(messages: list[dict[str, str]]) -> str:
    """What the user asked first: a system message is often the same in every conversation."""
    return next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])


def _json_lines(text: str, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 and its like may stand inside JSON text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path} line {number} is not a JSON object")
        yield row
