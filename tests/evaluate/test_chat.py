"""`stage=chat`: answers stream, conversations go on, the teacher answers as well."""

import io
import sys

import pytest

from qat.cli import arguments, main
from qat.errors import ConfigError
from qat.models import ModelFolder
from qat.models.tiny import TEMPLATE
from qat.stages import chat
from tests.launching import python

WORDS = ("stage=chat", "chat.max_tokens=200")


@pytest.fixture
def talk(command):
    """The stage within this process."""
    return lambda *words: chat.main(main.check(arguments.parse(command(*WORDS, *words)[2:])).configs[0])


class Pipe(io.RawIOBase):
    """Keeps what arrives at it, piece by piece."""

    def __init__(self):
        self.pieces = []

    def writable(self):
        return True

    def write(self, piece):
        self.pieces.append(bytes(piece))
        return len(piece)


def test_an_answer_arrives_in_pieces(talk, outputs, monkeypatch):
    """Standard output is buffered as that to a pipe is: an answer that nobody flushes would be one piece."""
    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))
    talk(f"checkpoint={outputs}/SR-001", "chat.prompt=hi", "seed=1", "chat.temperature=1")
    sys.stdout.flush()
    assert len(pipe.pieces) > 5 and b"".join(pipe.pieces).endswith(b"\n")


def test_a_conversation_with_both_side_by_side(command, outputs, monkeypatch):
    words = command(*WORDS, "chat.max_tokens=8", "checkpoint=SR-001", "chat.teacher=true")
    before = sorted(outputs.glob("SR-*"))
    monkeypatch.chdir(outputs.parent)
    done = python(*words[1:], stdin="hi\nagain\n\n")
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.removeprefix("you: ") for line in done.stdout.splitlines()]
    assert [line for line in said if line in ("teacher:", "student:")] == ["teacher:", "student:"] * 2
    assert sorted(outputs.glob("SR-*")) == before  # no run


@pytest.mark.parametrize("words", [("checkpoint=SR-001", "chat.teacher=true"), ("checkpoint=SR-001",), ()])
def test_one_prompt_is_answered_at_once(talk, capsys, words):
    talk("chat.max_tokens=4", "chat.prompt=hi", *words)
    shown = capsys.readouterr().out
    assert ("teacher:" in shown and "student:" in shown) == (len(words) == 2)
    assert shown.endswith("\n") and "you:" not in shown


def test_each_speaker_hears_its_own_answers(talk, monkeypatch, capsys):
    heard, lines = [], iter(["one", "two", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, asked, *_: answer(tokenizer.decode(asked)))

    def answer(asked):
        heard.append(asked)
        return f"answer {len(heard)}"

    talk("checkpoint=SR-001", "chat.teacher=true")
    first = "<|user|>one<|end|>"
    again = [f"{first}<|assistant|>answer {n}<|end|><|user|>two<|end|><|assistant|>" for n in (1, 2)]
    assert heard == [f"{first}<|assistant|>"] * 2 + again


def test_the_thinking_switch_reaches_the_template(talk, monkeypatch, capsys):
    heard, tokenizer = [], ModelFolder.tokenizer

    def thinking(folder):
        found = tokenizer(folder)
        found.chat_template = TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
        return found

    monkeypatch.setattr(ModelFolder, "tokenizer", thinking)
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, asked, *_: heard.append(tokenizer.decode(asked)) or "")
    for switch in ("true", "false"):
        talk("chat.prompt=hi", f"chat.thinking={switch}")
    assert [asked.endswith("<|assistant|><think>") for asked in heard] == [True, False]


def test_a_template_without_a_thinking_mode_says_so(talk):
    with pytest.raises(ConfigError, match=r"^chat\.thinking=true: the chat template of tiny has no thinking mode$"):
        talk("chat.prompt=hi", "chat.thinking=true")
