"""Conversations through the chat template, in the thinking modes that are asked for.

A chat template's switch is made for the question: most templates ignore it for answers that are
there. So the variant without thinking loses its think blocks before it is rendered, and the other
keeps them whole, also where the template would drop what an earlier turn thought.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qat.data import marks
from qat.data.conversations import Conversation, Messages, is_empty
from qat.data.tally import Unusable
from qat.errors import ConfigError, reason

THOUGHT, ANSWER = "<think>", "</think>"  # marks before the thoughts and before the answer
SPACE = re.compile(r"\s*")
EMPTY = r"(?:<think>\s*</think>\s*)?"  # empty thoughts, which some templates put before any answer

# Errors of a template: its own, and those that Python raises for its computations.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
INSTEAD = "use data=tokens, openings or text"


@dataclass(frozen=True)
class Rendering:
    """A conversation as text in one mode, with what the template was given for it; marks in both are hidden."""

    text: str
    mode: str
    messages: Messages
    tools: list[Any]


def renderings(tokenizer: PreTrainedTokenizerBase, said: Conversation, thinking: str) -> list[Rendering]:
    """A conversation in the asked modes; `both` gives one where both come out the same.

    Raises:
        ConfigError: there is no template.
        Unusable: the template refuses the conversation or does not show all of it, or no answer is left of it.
    """
    hiding = marks.of(tokenizer)
    messages, tools = hiding.hidden(_in_known_roles(tokenizer, said.messages)), hiding.hide(said.tools)
    modes = ["false", "true"] if thinking == "both" else [thinking]
    found = [one for mode in modes for one in _in_mode(tokenizer, messages, tools, mode)]
    if not found:
        raise Unusable("an empty answer", damaged=False)
    return list({one.text: one for one in reversed(found)}.values())[::-1]


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str = "false", ask: bool = False
) -> list[int]:
    """A conversation through the tokenizer's own chat template; with `ask`, up to where the answer begins.

    Raises:
        ConfigError: there is no template, or it refuses the conversation.
    """
    hiding = marks.of(tokenizer)
    try:
        return hiding.tokens(template(tokenizer, hiding.hidden(messages), thinking, add_generation_prompt=ask))
    except Unusable as refused:
        said = f"the chat template refuses a conversation ({refused.detail}): {str(messages)[:200]}"
        raise ConfigError(said) from None


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokens of a conversation up to where the user begins to speak, and the token that ends what the user says.

    Raises:
        ConfigError: there is no template, or it does not show what the user says.
    """
    mark = "what-the-user-says"
    try:
        whole = template(tokenizer, [{"role": "user", "content": mark}], "false")
    except Unusable as refused:
        raise ConfigError(f"data.start=questions: the chat template refuses a question ({refused.detail})") from None
    opening, said, closing = whole.partition(mark)
    ids, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, closing))
    if not (said and ids and end):
        raise ConfigError("data.start=questions: the chat template has no marks around what a user says")
    return list(ids), int(end[0])


def _in_known_roles(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """A developer instructs as a system message does, which is the older name and the one that most templates know."""
    if "developer" in str(tokenizer.chat_template):
        return messages
    return [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]


def _in_mode(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any], mode: str) -> list[Rendering]:
    """One rendering; none where thoughts are left out and the answer has nothing else."""
    if mode == "false":
        messages = [_of_assistant(message, _apart(message["content"])[0]) for message in messages]
        if any(is_empty(message) for message in messages):
            return []

    def render(messages: Messages) -> str:
        if mode == "false":
            return template(tokenizer, messages, mode, tools)
        return _thinking(tokenizer, messages, tools)

    text = render(messages)
    _check_shown(messages, text, render)
    return [Rendering(text, mode, messages, tools)]


def _check_shown(messages: Messages, text: str, render: Callable[[Messages], str]) -> None:
    """Refuses a text if the template ignored a part of it: the text is the same without that part.

    Of messages of one kind, which a template treats alike, the first is looked at.
    """
    kinds: dict[tuple[str, bool, bool], int] = {}
    for number, message in enumerate(messages):
        kinds.setdefault((message["role"], "tool_calls" in message, bool(message["content"].strip())), number)
    for (role, calls, speaks), number in kinds.items():
        before, message, behind = messages[:number], messages[number], messages[number + 1 :]
        if calls:
            what, without = "calls of tools", [*before, _without_calls(message), *behind]
        elif role in ("user", "assistant") or not speaks or message["content"].strip() in text:
            continue
        else:
            what, without = f"messages of the role {role}", [*before, *behind]
        try:
            overlooked = render(without) == text
        except Unusable:  # the template left this out
            continue
        if overlooked:
            raise Unusable(f"{what}, which the chat template does not show", damaged=False)


def _thinking(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any]) -> str:
    thoughts = [t.strip() for m in messages if m["role"] == "assistant" for t in _apart(m["content"])[1]]
    rendered = template(tokenizer, messages, "true", tools)
    if _in_order(thoughts, rendered):
        return rendered
    stand_ins = [f"answer-{number}-of-{len(messages)}-here" for number in range(len(messages))]
    told = [_of_assistant(message, name) for message, name in zip(messages, stand_ins, strict=True)]
    text = template(tokenizer, told, "true", tools)
    for message, name in zip(messages, stand_ins, strict=True):
        text = re.sub(EMPTY + name, lambda _, whole=message["content"]: whole, text)  # type: ignore[misc]
    return text


def _apart(said: str) -> tuple[str, list[str]]:
    """What was said without its think blocks and the space behind them, and what was thought in each."""
    answer, thoughts, at = [], [], 0
    while (begin := said.find(THOUGHT, at)) >= 0 and (end := said.find(ANSWER, begin)) >= 0:
        answer.append(said[at:begin])
        thoughts.append(said[begin + len(THOUGHT) : end])
        at = end + len(ANSWER)
        at += len(space[0]) if (space := SPACE.match(said, at)) else 0
    return "".join([*answer, said[at:]]), thoughts


def _in_order(parts: list[str], text: str) -> bool:
    """Whether all parts come in a text, one behind the other."""
    at = 0
    for part in parts:
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def _of_assistant(message: dict[str, Any], content: str) -> dict[str, Any]:
    return message | {"content": content} if message["role"] == "assistant" else message


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    thinking: str,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Messages as the tokenizer's own chat template has them, up to where an answer begins if that is asked for.

    Raises:
        ConfigError: there is no template.
        Unusable: it refuses them.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"this model's tokenizer has no chat template: {INSTEAD}")
    how = {"enable_thinking": thinking == "true", "add_generation_prompt": add_generation_prompt}
    try:
        whole = cast(Any, tokenizer).apply_chat_template(messages, tools=tools or None, tokenize=False, **how)
    except REFUSALS as error:
        raise Unusable("refused by the chat template", reason(error)[:200], damaged=False) from None
    return str(whole)
