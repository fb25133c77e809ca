"""Talking to a student, or to the teacher."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qat import checkpoints, machine, models
from qat.config import Config
from qat.console import console
from qat.data.thinking import chat_tokens
from qat.quant.linear import baked
from qat.stages.workspace import start_folder

Messages = list[dict[str, str]]


def main(config: Config) -> None:
    """`stage=chat`: answers `chat.prompt`, or holds a conversation until an empty line."""
    resolved = machine.resolve(config.instance)
    folder = models.locate(config.model, Path(config.outputs) / "artifacts")
    start = start_folder(config.checkpoint)
    if start is None:
        model = folder.load(resolved.dtype, resolved.device)
    else:
        model, _ = checkpoints.load(start, folder, resolved)
    tokenizer = folder.tokenizer()
    with baked(model, resolved.dtype):
        if config.chat.prompt is not None:
            reply(model, tokenizer, [{"role": "user", "content": config.chat.prompt}], config)
        else:
            _converse(model, tokenizer, config)


def _converse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    console.print("An empty line ends the conversation.")
    messages: Messages = []
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            return
        if not said:
            return
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": reply(model, tokenizer, messages, config)})


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Messages, config: Config) -> str:
    """Prints the answer as it comes, and returns it."""
    asked = torch.tensor([chat_tokens(tokenizer, messages, config.data.thinking, ask=True)], device=model.device)
    sampling = {"temperature": config.chat.temperature} if config.chat.temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=config.chat.max_tokens,
        do_sample=bool(sampling),
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    mask = torch.ones_like(asked)
    written = models.generate(model, asked, settings, attention_mask=mask, streamer=streamer)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
