"""Tokenizers of merged characters with bytes for all others, as SentencePiece makes them, for llama.cpp.

A `tokenizer.json` lists merges of two tokens, best first. llama.cpp has a score for each token and joins, of two
neighbours that make a token, those that make the best one (`llm_tokenizer_spm` in `src/llama-vocab.cpp`).
"""

import re
from typing import Any

from gguf import GGUFWriter

from qat.console import console
from qat.errors import ConfigError

SPACE = "▁"
BYTE = re.compile("<0x[0-9A-F]{2}>")
TAKEN_AS_IT_IS = "export=hf or export=mlx take the tokenizer as it is"
PLAIN = ({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, None)


def merged(described: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` describes one of these.

    Some versions of transformers say `byte_fallback` of tokenizers of bytes too, which have no tokens to fall back to.
    """
    model = described["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and "<0x00>" in model["vocab"]


def is_byte(token: str) -> bool:
    """Whether a token stands for one byte."""
    return BYTE.fullmatch(token) is not None


def add(writer: GGUFWriter, described: dict[str, Any], tokens: list[str]) -> None:
    """Writes what is particular to them.

    Args:
        writer: of the file.
        described: a `tokenizer.json`.
        tokens: of the model, by number.

    Raises:
        ConfigError: as `scores` and `prefixed`.
    """
    found = scores(described)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([found.get(token, -1e6) for token in tokens])  # those that no merge makes need none
    prefix, otherwise = prefixed(described)
    writer.add_add_space_prefix(prefix)
    if otherwise:
        console.say(f"llama.cpp makes other tokens of {otherwise} than the model's tokenizer")


def scores(described: dict[str, Any]) -> dict[str, float]:
    """The best merge of each token that merges make, the first one 0 and all others below it.

    Raises:
        ConfigError: two tokens make a third and are never merged, or others come between merges that make one.
    """
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in described["model"]["merges"]]
    vocabulary = set(described["model"]["vocab"])
    whole = {token["content"] for token in described["added_tokens"]}  # found in text before anything is merged
    found: dict[str, float] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last and token in found and token not in whole:
            raise ConfigError(f"llama.cpp merges into one token after the other, and this tokenizer not ({token})")
        found.setdefault(token, float(-rank))
        last = token
    known = set(merges)
    for token in vocabulary - whole:
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known and not is_byte(token):
                raise ConfigError(
                    f"llama.cpp merges any two tokens that make a third, and this tokenizer not {pair[0]} and"
                    f" {pair[1]}: {TAKEN_AS_IT_IS}"
                )
    return found


def prefixed(described: dict[str, Any]) -> tuple[bool, str]:
    """Whether llama.cpp begins texts, also behind special tokens, with a space; and of what it makes other tokens.

    Raises:
        ConfigError: text is changed or split in another way before.
    """
    normalizer = described.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = described.get("pre_tokenizer")
    if steps == [{"type": "Prepend", "prepend": SPACE}, replaced] and before in PLAIN:
        return True, ""
    if steps == [replaced] and before in PLAIN:
        return False, ""
    match before:
        case {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme} if not steps:
            return {
                "never": (False, ""),
                "first": (False, "a text that begins with neither a special token nor a space"),
                "always": (True, "a text that begins with a space"),
            }[scheme]
    raise ConfigError(
        f"export=gguf does not know how to tell llama.cpp what this tokenizer does before it merges characters"
        f" ({normalizer!s:.100}, {before!s:.100}): {TAKEN_AS_IT_IS}"
    )
