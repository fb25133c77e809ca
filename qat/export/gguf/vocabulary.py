"""A tokenizer as llama.cpp reads it: tokens, merges, what splits text before them, ends, and the chat template.

How text is split before merges llama.cpp has in code, by name. The name is found by what a tokenizer's own description
says that it does, so that any model with such a tokenizer is written right, whatever it is called.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qat.errors import ConfigError
from qat.models import ModelFolder

BEFORE = r"[^\r\n\p{L}\p{N}]?"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SIGNS, SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4O = (
    f"{BEFORE}{UPPER}*{LOWER}+{ENDINGS}?|{BEFORE}{UPPER}+{LOWER}*{ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
Step = tuple[str, Any]
SPLITS: dict[tuple[Step, ...], str] = {  # llama.cpp's name for each sequence of pre-tokenizer steps
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", rf"{ENDINGS}|{BEFORE}\p{{L}}+|\p{{N}}|{SIGNS}|{SPACES}"), ("bytes", False)): "qwen2",
    (("split", rf"{ENDINGS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}"), ("bytes", False)): "llama-bpe",
    (("split", GPT_4O), ("bytes", False)): "gpt-4o",
}
WHOLE_WORDS_FIRST = {"llama-bpe": "dbrx"}  # name for the same splits where words that are tokens are taken whole
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
    steps = tuple(_steps(described.get("pre_tokenizer")))
    if steps not in SPLITS:
        raise ConfigError(
            f"export=gguf does not know llama.cpp's name for how this tokenizer splits text ({_told(steps)}); it knows"
            f" {', '.join(SPLITS.values())}"
        )
    name = SPLITS[steps]
    return name if model.get("ignore_merges") else WHOLE_WORDS_FIRST.get(name, name)


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


def _steps(described: Any) -> list[Step]:
    """What a pre-tokenizer does, step after step."""
    match described:
        case {"type": "Sequence", "pretokenizers": [*each]}:
            return [step for one in each for step in _steps(one)]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [("bytes", bool(described.get("use_regex", True)))]
        case {"type": "Digits", "individual_digits": alone}:
            return [("digits", alone)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return [("split", pattern)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return [("split", pattern)]
    return [("other", json.dumps(described))]


def _merge(pair: str | list[str]) -> str:
    """Two tokens with a space between them; spaces inside are written as byte-level merges write them."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)


def _kind(model: dict[str, Any], normalizer: dict[str, Any] | None) -> str:
    if model["type"] != "BPE":
        return f"a {model['type']}"
    return "one of merged characters" if model.get("byte_fallback") else f"one that changes text ({normalizer!s:.80})"


def _told(steps: tuple[Step, ...]) -> str:
    return ", then ".join(f"{name} {value!s:.120}" for name, value in steps) or "not at all"
