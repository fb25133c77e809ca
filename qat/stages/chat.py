"""Talking to a student, to its teacher, or to both side by side."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat import checkpoints, machine, models, transfer
from qat.config import Config
from qat.console import console
from qat.data.asking import begun, takes_questions
from qat.data.thinking import Messages, chat_tokens
from qat.errors import ConfigError
from qat.evaluate.answers import settings_of, stream
from qat.machine import Machine
from qat.models import ModelFolder, tokenizers
from qat.quant.linear import baked
from qat.stages import limits
from qat.stages.workspace import start_folder


@dataclass
class Speaker:
    """A model with its own side of the conversation; `name` is empty where only one speaks."""

    name: str
    model: PreTrainedModel
    messages: Messages = field(default_factory=list)


@dataclass(frozen=True)
class Language:
    """How what is said becomes tokens: as a conversation, or as a text to go on with."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    converses: bool


def main(config: Config) -> None:
    """`stage=chat`: answers `chat.prompt`, or holds a conversation until an empty line."""
    config = transfer.with_named(config)
    resolved = machine.resolve(config.instance)
    start = start_folder(config.checkpoint)
    asked = config.teacher if start is None or config.chat.teacher else None  # a student speaks without its teacher
    model, teacher = models.pair(config.model, asked, Path(config.outputs) / "artifacts")
    limits.check_lengths(config, model, teacher)
    limits.check_memory(config, model, teacher, resolved)
    language = _language(config, model)
    torch.manual_seed(config.seed)
    with ExitStack() as kept:
        speakers = _speakers(config, start, model, teacher, resolved)
        for speaker in speakers:
            kept.enter_context(baked(speaker.model, resolved.dtype))
        for said in _said(config):
            for speaker in speakers:
                _answer(speaker, said, language, config)


def _language(config: Config, model: ModelFolder) -> Language:
    """The language of a chat with this model; prints a notice where only plain text can be continued."""
    tokenizer = model.tokenizer()
    tokenizers.check(model.path, tokenizer, model.vocab_size())
    converses = takes_questions(tokenizer)
    if converses:
        _check_thinking(tokenizer, config, model)
        return Language(tokenizer, model.ends(), converses)
    why = f"{model.name} has no chat template that takes a question"
    if config.chat.thinking:
        raise ConfigError(f"chat.thinking=true: {why}")
    console.say(f"{why}: it goes on with the text you give.")
    return Language(tokenizer, model.ends(), converses)


def _speakers(
    config: Config, start: Path | None, model: ModelFolder, teacher: ModelFolder, resolved: Machine
) -> list[Speaker]:
    alone = start is None or not config.chat.teacher
    speakers = []
    if start is None or config.chat.teacher:
        speakers.append(Speaker("" if alone else "teacher", teacher.load(resolved.dtype, resolved.device)))
    if start is not None:
        student, _ = checkpoints.load(start, model, resolved)
        speakers.append(Speaker("" if alone else "student", student))
    return speakers


def _said(config: Config) -> Iterator[str]:
    """What the user says: one prompt, or line after line."""
    if config.chat.prompt is not None:
        yield config.chat.prompt
        return
    console.print("An empty line ends the conversation.")
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            return
        if not said:
            return
        yield said


def _answer(speaker: Speaker, said: str, language: Language, config: Config) -> None:
    """Writes a speaker's answer as it comes, and adds both to its conversation."""
    if speaker.name:
        console.print(f"{speaker.name}:")
    tokenizer = language.tokenizer
    speaker.messages.append({"role": "user", "content": said})
    if language.converses:
        asked = chat_tokens(tokenizer, speaker.messages, _mode(config.chat.thinking), ask=True)
    else:
        asked = begun(tokenizer, said)
    settings = settings_of(tokenizer, language.ends, config.chat.max_tokens, config.chat.temperature)
    answer = stream(speaker.model, tokenizer, asked, settings, sys.stdout)
    speaker.messages.append({"role": "assistant", "content": answer})


def _check_thinking(tokenizer: PreTrainedTokenizerBase, config: Config, model: ModelFolder) -> None:
    """Refuses a switch that the chat template does not have."""
    asked: Messages = [{"role": "user", "content": "?"}]
    plain, thinking = (chat_tokens(tokenizer, asked, _mode(switch), ask=True) for switch in (False, True))
    if config.chat.thinking and plain == thinking:
        raise ConfigError(f"chat.thinking=true: the chat template of {model.name} has no thinking mode")


def _mode(thinking: bool) -> str:
    return "true" if thinking else "false"
