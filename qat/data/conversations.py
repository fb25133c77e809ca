"""Turns rows into conversations, with tables of the usual names for turns, roles, questions and answers.

What comes out is what chat templates take: messages with a role and a text, and the calls of tools where an
assistant makes any. What a row has besides (weights, ids, names of sources) says nothing to a model.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from qat.data.reading import check
from qat.data.tally import Unusable

Messages = list[dict[str, Any]]

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input", "inputs")
CONTEXTS = ("input", "context")  # names for the text that an instruction is about
ANSWERS = ("output", "completion", "response", "answer", "chosen", "solution", "target", "targets")
TEXTS = ("text", "content")

ROLE, SAID = ("role", "from"), ("content", "value")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
SHOWN = 80  # characters of an unexpected value that a message shows

ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "call": ("function_call", "tool_call"),  # a tool call by the assistant, named as in ShareGPT
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


@dataclass(frozen=True)
class Conversation:
    """What was said.

    Attributes:
        messages: each with `role`, `content` and, of an assistant who makes any, `tool_calls`.
        tools: descriptions of those that the assistant could call, if there were any.
    """

    messages: Messages
    tools: list[Any] = field(default_factory=list)

    @property
    def question(self) -> str:
        """What the user asked first: a system message is often the same in every conversation."""
        users = (message["content"] for message in self.messages if message["role"] == "user")
        return str(next(users, self.messages[0]["content"]))


def conversation(row: dict[str, Any]) -> Conversation:
    """The conversation of a row.

    Raises:
        Unusable: there is none in it, or no answer to learn from.
    """
    _, turns = _first(row, TURNS)
    messages = _asked(row) if turns is None else _messages(turns)
    messages = _instructed(messages, _first(row, SYSTEMS)[1])
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        raise Unusable("nothing said", damaged=False)
    if any(is_empty(message) for message in messages):
        raise Unusable("an empty answer", damaged=False)
    return Conversation(messages, _tools(row.get("tools")))


def question(row: dict[str, Any]) -> str:
    """What is asked in a row, with or without an answer.

    Raises:
        Unusable: nothing is.
    """
    _, turns = _first(row, TURNS)
    name, asked = _first(row, (*QUESTIONS, *TEXTS))
    turns = asked if isinstance(asked, list) and turns is None else turns
    return Conversation(_messages(turns)).question if turns is not None else _in_context(row, name, asked)


def text(row: dict[str, Any]) -> str:
    """The text of a row, or its answer where that is all there is.

    Raises:
        Unusable: it has none.
    """
    _, found = _first(row, (*TEXTS, "output"))
    if found is None:
        raise Unusable("no text", _names(row), "data=chat_jsonl reads conversations, and questions with answers")
    whole = _text(found)
    if not whole.strip():
        raise Unusable("an empty text", damaged=False)
    return whole


def _asked(row: dict[str, Any]) -> Messages:
    """A question and its answer, behind what was asked before."""
    name, asked = _first(row, QUESTIONS)
    _, answer = _first(row, ANSWERS)
    if answer is None or (asked is None and not isinstance(answer, list)):
        remedy = "data=prompts lets the teacher answer" if asked else ""
        remedy = "data=text reads texts" if _first(row, TEXTS)[0] else remedy
        raise Unusable("no conversation, and no question with an answer", _names(row), remedy)
    said = _messages(answer) if isinstance(answer, list) else [{"role": "assistant", "content": _text(answer)}]
    if asked is None or any(message["role"] == "user" for message in said):
        return said  # the field holds a whole conversation, as in some preference data
    before = _messages(asked) if isinstance(asked, list) else [_user(_in_context(row, name, asked))]
    return [*_history(row.get("history")), *before, *said]


def _in_context(row: dict[str, Any], name: str, asked: Any) -> str:
    """A question with what it is about."""
    if asked is None:
        raise Unusable("no question", _names(row))
    _, context = _first(row, tuple(other for other in CONTEXTS if other != name))
    return f"{_text(asked)}\n\n{_text(context)}" if context else _text(asked)


def _instructed(messages: Messages, system: Any) -> Messages:
    """Messages behind a system message that the row has beside them."""
    if not system:
        return messages
    instruction = {"role": "system", "content": _text(system)}
    if messages[0]["role"] != "system":
        return [instruction, *messages]
    if messages[0] != instruction:
        raise Unusable("two system messages", damaged=False)
    return messages


def _history(pairs: Any) -> Messages:
    """What was asked and answered before."""
    if not pairs:
        return []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise Unusable("a history that is no list of pairs")
    spoken = [(_user(_text(asked)), {"role": "assistant", "content": _text(answer)}) for asked, answer in pairs]
    return [message for pair in spoken for message in pair]


def _user(said: str) -> dict[str, Any]:
    return {"role": "user", "content": said}


def _messages(turns: Any) -> Messages:
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        # `datasets` stores a list of objects as one list for each name.
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        raise Unusable("turns that are no list")
    if not turns:
        raise Unusable("no turns")
    return [_message(turn) for turn in turns]


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Unusable("a turn that is no object", repr(turn)[:SHOWN])
    role, (_, said) = _role(turn), _first(turn, SAID)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(said)}
    if said is None and role != "assistant":
        raise Unusable("a turn without a text", _names(turn))
    message: dict[str, Any] = {"role": role, "content": "" if said is None else _text(said)}
    if role == "tool":
        return message | {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    if role != "assistant":
        return message
    _, thought = _first(turn, THOUGHTS)
    if thought:
        message["content"] = f"<think>\n{_text(thought)}\n</think>\n\n{message['content']}"
    calls = turn.get("tool_calls") or turn.get("function_call")
    return message | ({"tool_calls": _calls(calls)} if calls else {})


def _role(turn: dict[str, Any]) -> str:
    _, named = _first(turn, ROLE)
    if named is None:
        raise Unusable("a turn without a role", _names(turn))
    role = ROLE_OF.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise Unusable("a role that nobody knows", repr(named)[:SHOWN])
    return role


def _text(said: Any) -> str:
    """A text, or the texts of a list of parts one after another."""
    if isinstance(said, list):
        return "".join(map(_part, said))
    if not isinstance(said, str):
        raise Unusable("a text that is no string", repr(said)[:SHOWN])
    check(said)
    return said


def _part(part: Any) -> str:
    whole = {"type": "text", "text": part} if isinstance(part, str) else part
    if not isinstance(whole, dict) or not isinstance(whole.get("text"), str):
        kind = whole.get("type") if isinstance(whole, dict) else whole
        raise Unusable("parts that are no text", repr(kind)[:SHOWN], damaged=False)
    return _text(whole["text"])


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Calls of tools as templates take them: arguments as an object."""
    listed = _value(calls, "calls of tools that are not JSON")
    return [_call(call) for call in (listed if isinstance(listed, list) else [listed])]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a call of a tool without a name", repr(call)[:SHOWN])
    arguments = _value(function.get("arguments") or {}, "arguments of a tool that are not JSON")
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[Any]:
    listed = _value(tools or [], "descriptions of tools that are not JSON")
    if not isinstance(listed, list):
        raise Unusable("descriptions of tools that are no list")
    return listed


def _value(said: Any, reason: str) -> Any:
    """What a string of JSON says; anything else is itself."""
    if not isinstance(said, str):
        return said
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        raise Unusable(reason, str(error)) from None


def is_empty(message: dict[str, Any]) -> bool:
    """True for an empty answer, which would train the student to say nothing."""
    return message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message


def _first(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of some names that has a value, with the value."""
    return next(((name, row[name]) for name in names if row.get(name) is not None), ("", None))


def _names(row: dict[str, Any]) -> str:
    """The fields that the row has instead, for a message."""
    return f"it has {', '.join(repr(name) for name in row)[:SHOWN]}" if row else "it is empty"
