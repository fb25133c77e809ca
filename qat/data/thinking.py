"""Thinking modes of conversations that exist already.

A chat template's switch is made for the question: most templates ignore it for answers that are
there. So the variant without thinking loses its think blocks before it is rendered, and the other
keeps them whole, also where the template would drop what an earlier turn thought.
"""

import re
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qat.errors import ConfigError, reason

BLOCK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
EMPTY = r"(?:<think>\s*</think>\s*)?"  # which some templates put before any answer

# A template is a program over messages: besides its own errors it raises what Python does for what it computes.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
INSTEAD = "use data=tokens, openings or text"

Messages = list[dict[str, str]]


def renderings(tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str) -> list[list[int]]:
    """Tokens of a conversation in the asked modes; `both` gives one where both come out the same."""
    modes = ["false", "true"] if thinking == "both" else [thinking]
    found = [_thinking(tokenizer, messages) if mode == "true" else _plain(tokenizer, messages) for mode in modes]
    return [tokens for number, tokens in enumerate(found) if tokens not in found[:number]]


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str = "false", ask: bool = False
) -> list[int]:
    """A conversation through the tokenizer's own chat template; with `ask`, up to where the answer begins.

    Raises:
        ConfigError: there is no template, or it refuses the conversation.
    """
    encoded: Any = _template(tokenizer, messages, thinking, add_generation_prompt=ask, return_dict=True)
    return list(encoded["input_ids"])


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokens of a conversation up to where the user begins to speak, and the token that ends what the user says.

    Raises:
        ConfigError: there is no template, or it does not show what the user says.
    """
    mark = "what-the-user-says"
    opening, said, closing = _template(
        tokenizer, [{"role": "user", "content": mark}], "false", tokenize=False
    ).partition(mark)
    ids, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, closing))
    if not (said and ids and end):
        raise ConfigError("data.start=questions: the chat template has no marks around what a user says")
    return list(ids), int(end[0])


def _plain(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    answered = [_of_assistant(message, BLOCK.sub("", message["content"])) for message in messages]
    return chat_tokens(tokenizer, answered, "false")


def _thinking(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    thoughts = [t.strip() for m in messages if m["role"] == "assistant" for t in BLOCK.findall(m["content"])]
    rendered = _template(tokenizer, messages, "true", tokenize=False) if thoughts else ""
    if all(thought in rendered for thought in thoughts):
        return chat_tokens(tokenizer, messages, "true")
    marks = [f"answer-{number}-of-{len(messages)}-here" for number in range(len(messages))]
    marked = [_of_assistant(message, mark) for message, mark in zip(messages, marks, strict=True)]
    text = _template(tokenizer, marked, "true", tokenize=False)
    for message, mark in zip(messages, marks, strict=True):
        text = re.sub(EMPTY + mark, lambda _, whole=message["content"]: whole, text)  # type: ignore[misc]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _of_assistant(message: dict[str, str], content: str) -> dict[str, str]:
    return message | {"content": content} if message["role"] == "assistant" else message


def _template(tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str, **how: bool) -> Any:
    if not tokenizer.chat_template:
        raise ConfigError(f"this model's tokenizer has no chat template: {INSTEAD}")
    try:
        return cast(Any, tokenizer).apply_chat_template(messages, enable_thinking=thinking == "true", **how)
    except REFUSALS as error:
        said = str(messages)[:200]
        raise ConfigError(f"the chat template refuses a conversation ({reason(error)}): {said}; {INSTEAD}") from None
