"""A tokenizer as llama.cpp reads it: tokens, merges, what splits text before them, ends, and the chat template.

llama.cpp's name for how text is split before merges is found by what a tokenizer's own description says that it does,
so that any model with such a tokenizer is written right, whatever it is called.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qat.errors import ConfigError
from qat.models import ModelFolder
from qat.models.splits import STEPS, Step, name_of, steps

NEVER = "-- --"  # a merge that never applies: llama.cpp wants at least one, and a tokenizer of bytes has none
ENDS = ("eos", "eot", "eom")  # kinds of tokens that end a text


def add(writer: GGUFWriter, teacher: ModelFolder) -> None:
    """Writes the tokenizer of a model; nothing where it has none.

    Raises:
        ConfigError: it is of a kind, or splits text in a way, that llama.cpp has no name for here.
    """
    if not teacher.has_tokenizer():
        return
    tokenizer = teacher.tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_pre(splits(described))  # before anything is written, as it may refuse
    writer.add_tokenizer_model("gpt2")
    tokens, kinds = listed(tokenizer, described, teacher.vocab_size())
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([_merge(pair) for pair in described["model"]["merges"]] or [NEVER])
    _add_special(writer, tokenizer, teacher)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def splits(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer, as `tokenizer.json` describes it, splits text before its merges.

    Raises:
        ConfigError: it has none that is known here.
    """
    model, normalizer = described["model"], described.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback") or (normalizer and normalizer["type"] != "NFC"):
        raise ConfigError(
            f"export=gguf writes tokenizers of merged bytes, and this one is {_kind(model, normalizer)}: export=hf is"
            " dense, and llama.cpp's own converter takes it on"
        )
    found = steps(described.get("pre_tokenizer"))
    name = name_of(found, bool(model.get("ignore_merges")))
    if name is None:
        raise ConfigError(
            f"export=gguf does not know llama.cpp's name for how this tokenizer splits text ({_told(found)}); it knows"
            f" {', '.join(STEPS)}"
        )
    return name


def listed(tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token of the model and its kind; numbers that stand for nothing are filled up."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [int(TokenType.UNUSED)] * size
    for token, number in described["model"]["vocab"].items():
        tokens[number], kinds[number] = token, int(TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        kinds[number] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return tokens, kinds


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, teacher: ModelFolder) -> None:
    """Tokens with a meaning: the tokenizer's own end first, then those that other files name."""
    own = tokenizer.eos_token_id
    ends = [*([own] if own is not None else []), *(end for end in teacher.ends() if end != own)]
    for name, number in zip(ENDS, ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    written = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(written) and written[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(written) and written[-1] == own)


def _merge(pair: str | list[str]) -> str:
    """Two tokens with a space between them; spaces inside are written as byte-level merges write them."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)


def _kind(model: dict[str, Any], normalizer: dict[str, Any] | None) -> str:
    if model["type"] != "BPE":
        return f"a {model['type']}"
    return "one of merged characters" if model.get("byte_fallback") else f"one that changes text ({normalizer!s:.80})"


def _told(found: tuple[Step, ...]) -> str:
    return ", then ".join(f"{name} {value!s:.120}" for name, value in found) or "not at all"
