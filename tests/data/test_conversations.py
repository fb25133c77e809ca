"""Rows under the names that people give them, and the conversations they become."""

import pytest

from qat.data.conversations import conversation, question, text
from qat.data.tally import Unusable


def user(said):
    return {"role": "user", "content": said}


def assistant(said, **others):
    return {"role": "assistant", "content": said} | others


def system(said):
    return {"role": "system", "content": said}


def call(name="f", arguments=None, **others):
    return others | {"type": "function", "function": {"name": name, "arguments": arguments or {}}}


ASKED = [user("q"), assistant("a")]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "dialogue"])
@pytest.mark.parametrize("turns", [ASKED, SHAREGPT, {"from": ["human", "gpt"], "value": ["q", "a"]}])
def test_turns_in_every_form_are_one_conversation(name, turns):
    assert conversation({"id": 7, name: turns}).messages == ASKED


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("user", "human", "Human", "prompter")),
        *((name, "assistant") for name in ("assistant", "gpt", "chatgpt", "bing", "bard", "model", " GPT ")),
        *((name, name) for name in ("system", "developer")),
        *((name, "tool") for name in ("tool", "function", "observation", "ipython")),
    ],
)
def test_roles(name, role):
    found = conversation({"messages": [{"role": name, "content": "x"}, user("y")]}).messages
    assert found[0] == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "output": "a"}, ASKED),
        ({"instruction": "q", "input": "", "output": "a"}, ASKED),
        ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni"), assistant("a")]),
        ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, [user("q\n\ni"), assistant("a")]),
        ({"input": "q", "output": "a"}, ASKED),
        ({"prompt": "q", "completion": "a"}, ASKED),
        ({"prompt": "q", "response": "a"}, ASKED),
        ({"question": "q", "answer": "a"}, ASKED),
        ({"problem": "q", "solution": "a"}, ASKED),
        ({"question": "q", "context": "i", "answer": "a"}, [user("q\n\ni"), assistant("a")]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [system("s"), *ASKED]),
        ({"system_prompt": "", "question": "q", "response": "a"}, ASKED),
        ({"instruction": "r", "output": "b", "history": [["q", "a"]]}, [*ASKED, user("r"), assistant("b")]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ASKED),
        ({"prompt": "q", "chosen": ASKED, "rejected": []}, ASKED),
        ({"chosen": ASKED, "rejected": []}, ASKED),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, ASKED),
        ({"prompt": "q", "messages": ASKED}, ASKED),
    ],
)
def test_questions_with_answers(row, messages):
    assert conversation(row).messages == messages


def test_a_system_message_may_stand_beside_the_turns():
    for row in ({"system": "s", "messages": ASKED}, {"system": "s", "messages": [system("s"), *ASKED]}):
        assert conversation(row).messages == [system("s"), *ASKED]
    with pytest.raises(Unusable, match="two system messages"):
        conversation({"system": "s", "messages": [system("t"), *ASKED]})


def test_a_text_may_come_in_parts():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert conversation({"messages": [user(parts), assistant(["x", "y"])]}).messages == [user("a b"), assistant("xy")]
    with pytest.raises(Unusable, match="parts that are no text") as said:
        conversation({"messages": [user([*parts, {"type": "image_url", "image_url": {}}]), assistant("x")]})
    assert said.value.detail == "'image_url'" and not said.value.damaged


def test_thoughts_beside_an_answer_are_before_it():
    row = {"messages": [user("q"), {"role": "assistant", "reasoning_content": "hm", "content": "a"}]}
    assert conversation(row).messages[1] == assistant("<think>\nhm\n</think>\n\na")


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"tool_calls": [{"id": "1", "name": "f", "arguments": {"a": 1}}], "function_call": None},
    ],
)
def test_calls_of_tools_are_as_templates_take_them(said):
    result = {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}
    row = {"messages": [user("q"), {"role": "assistant"} | said, result], "tools": '[{"name": "f"}]'}
    found = conversation(row)
    assert found.messages == [user("q"), assistant("", tool_calls=[call(arguments={"a": 1}, id="1")]), result]
    assert found.tools == [{"name": "f"}]


def test_older_and_other_forms_of_calls():
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    sharegpt = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    for turn in (older, sharegpt):
        assert conversation({"messages": [user("q"), turn]}).messages[1] == assistant("", tool_calls=[call()])


@pytest.mark.parametrize(
    ("row", "reason", "damaged"),
    [
        ({}, "no conversation, and no question with an answer", True),
        ({"messages": None, "id": 7}, "no conversation", True),
        ({"messages": []}, "no turns", True),
        ({"messages": {}}, "no turns", True),
        ({"messages": "hi"}, "turns that are no list", True),
        ({"messages": 3}, "turns that are no list", True),
        ({"messages": ["hi"]}, "a turn that is no object", True),
        ({"messages": [{"content": "q"}]}, "a turn without a role", True),
        ({"messages": [{"role": "narrator", "content": "q"}]}, "a role that nobody knows", True),
        ({"messages": [{"role": 3, "content": "q"}]}, "a role that nobody knows", True),
        ({"messages": [{"role": "user"}]}, "a turn without a text", True),
        ({"messages": [user(None), assistant("a")]}, "a turn without a text", True),
        ({"messages": [user(3), assistant("a")]}, "a text that is no string", True),
        ({"messages": [user("\ud800"), assistant("a")]}, "half of a surrogate pair", True),
        ({"messages": [user("q"), assistant("", tool_calls=[{}])]}, "a call of a tool without a name", True),
        ({"messages": [user("q"), assistant("", tool_calls="no")]}, "calls of tools that are not JSON", True),
        ({"messages": ASKED, "tools": 3}, "descriptions of tools that are no list", True),
        ({"instruction": "q"}, "no question with an answer", True),
        ({"output": "a"}, "no question with an answer", True),
        ({"instruction": "q", "output": 3}, "a text that is no string", True),
        ({"instruction": "q", "output": "a", "history": "b"}, "a history", True),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a"}, "no question with an answer", True),
        ({"instruction": "q", "output": " "}, "an empty answer", False),
        ({"messages": [user("q"), assistant("")]}, "an empty answer", False),
        ({"messages": [user("q"), assistant(None)]}, "an empty answer", False),
        ({"messages": [user("q"), assistant("\n"), user("r"), assistant("b")]}, "an empty answer", False),
        ({"messages": [user(""), assistant("")]}, "nothing said", False),
    ],
)
def test_rows_of_which_no_conversation_can_be_made(row, reason, damaged):
    with pytest.raises(Unusable, match=reason) as said:
        conversation(row)
    assert said.value.damaged is damaged


def test_rows_for_another_source_name_it():
    for row, source in (({"text": "t"}, "data=text"), ({"prompt": "q"}, "data=prompts")):
        with pytest.raises(Unusable) as said:
            conversation(row)
        assert said.value.remedy.startswith(source)
    with pytest.raises(Unusable, match="no text") as said:
        text({"messages": ASKED})
    assert said.value.remedy.startswith("data=chat_jsonl") and said.value.detail == "it has 'messages'"


def test_questions_without_answers():
    rows = [{"prompt": "q"}, {"question": "q"}, {"text": "q"}, {"prompt": [user("q")]}, {"messages": ASKED}]
    assert [question(row) for row in rows] == ["q"] * 5
    assert question({"instruction": "q", "input": "i", "output": "a"}) == "q\n\ni"
    with pytest.raises(Unusable, match="no question"):
        question({"answer": "a"})


def test_texts():
    assert [text(row) for row in ({"text": "t"}, {"content": "t"}, {"output": "t"})] == ["t"] * 3
    with pytest.raises(Unusable, match="an empty text"):
        text({"text": " \n"})
    with pytest.raises(Unusable, match="no string"):
        text({"text": 5})
