"""`stage=chat` in processes of its own: answers stream, conversations go on, the teacher answers as well."""

import os
import subprocess

import pytest

WORDS = ("stage=chat", "chat.max_tokens=200")


def test_an_answer_arrives_in_pieces(command, outputs):
    """The pipe is read as soon as anything is in it: an answer that came at once would be one piece."""
    words = command(*WORDS, "checkpoint=SR-001", "chat.prompt=hi", "seed=1", "chat.temperature=1")
    with subprocess.Popen(words, cwd=outputs.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        pieces = []
        while piece := os.read(process.stdout.fileno(), 65536):
            pieces.append(piece)
    assert process.returncode == 0
    assert len(pieces) > 5 and b"".join(pieces).endswith(b"\n")


def test_a_conversation_with_both_side_by_side(command, outputs):
    words = command(*WORDS, "chat.max_tokens=8", "checkpoint=SR-001", "chat.teacher=true")
    done = subprocess.run(words, cwd=outputs.parent, input="hi\nagain\n\n", capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.removeprefix("you: ") for line in done.stdout.splitlines()]
    assert [line for line in said if line in ("teacher:", "student:")] == ["teacher:", "student:"] * 2
    assert sorted(path.name for path in outputs.glob("SR-*")) == ["SR-001"]  # no run


@pytest.mark.parametrize("words", [("checkpoint=SR-001", "chat.teacher=true"), ()])
def test_one_prompt_is_answered_at_once(command, outputs, words):
    line = command(*WORDS, "chat.max_tokens=4", "chat.prompt=hi", *words)
    done = subprocess.run(
        line, cwd=outputs.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("teacher:" in done.stdout) == bool(words) and "you:" not in done.stdout


def test_a_template_without_a_thinking_mode_says_so(command, outputs):
    line = command(*WORDS, "chat.prompt=hi", "chat.thinking=true")
    done = subprocess.run(
        line, cwd=outputs.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert done.stderr == "error: chat.thinking=true: the chat template of tiny has no thinking mode\n"
