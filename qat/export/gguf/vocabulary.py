"""A tokenizer as llama.cpp reads it: tokens, merges or scores, what splits text before, ends, and the chat template.

What a tokenizer's own description says that it does decides how it is written, whatever it is called: merged bytes
with llama.cpp's name for how text is split before, or merged characters (SentencePiece), which have scores there.
"""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qat.console import console
from qat.errors import ConfigError
from qat.export.gguf import characters
from qat.models import ModelFolder
from qat.models.splits import STEPS, WHOLE_WORDS, Step, merge_to_themselves, name_of, steps

NEVER = "-- --"  # a merge that never applies: llama.cpp wants at least one, and a tokenizer of bytes has none
ENDS = ("eos", "eot", "eom")  # kinds of tokens that end a text
FOUND = (  # tokens that end an answer in llama.cpp by their names
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
)
PHI_3 = re.compile("phi-?3", re.IGNORECASE)
KEPT_BEHIND = {"<unk>", "<s>", "<|endoftext|>"}  # tokens of Phi-3 that leave spaces behind them, unlike all others


def check(teacher: ModelFolder) -> None:
    """Looks whether llama.cpp makes of text what the tokenizer of a model does.

    Raises:
        ConfigError: it is of a kind, or splits text in a way, that is not known here, or there is none.
    """
    _require(teacher)
    described = _described(teacher.tokenizer())
    if characters.merged(described):
        characters.scores(described)
        characters.prefixed(described)
    else:
        splits(described)


def _require(teacher: ModelFolder) -> None:
    """Refuses a model without a tokenizer: llama.cpp does not open its file, or ends the process that asks it."""
    if not teacher.has_tokenizer():
        raise ConfigError(
            f"{teacher.name} has no tokenizer, without which llama.cpp does not run a file: save one beside its"
            " weights, or take export=hf or export=packed"
        )


def add(writer: GGUFWriter, teacher: ModelFolder) -> None:
    """Writes the tokenizer of a model.

    Raises:
        ConfigError: as `check`.
    """
    _require(teacher)
    tokenizer = teacher.tokenizer()
    described = _described(tokenizer)
    tokens, kinds = listed(tokenizer, described, teacher.vocab_size())
    if characters.merged(described):
        characters.add(writer, described, tokens)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splits(described))
        writer.add_token_merges([_merge(pair) for pair in described["model"]["merges"]] or [NEVER])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, teacher)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def splits(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer, as `tokenizer.json` describes it, splits text before its merges.

    Raises:
        ConfigError: it has none that is known here.
    """
    model, changes = described["model"], _changes(described.get("normalizer"))
    affixes = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] != "BPE" or affixes or changes not in ([], ["NFC"]):
        raise ConfigError(
            f"export=gguf writes tokenizers of merged bytes and of SentencePiece's merged characters, and this one is"
            f" {_kind(model, changes)}: export=hf is dense, and llama.cpp's own converter takes it on"
        )
    found, whole = steps(described.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    name = name_of(found, whole)
    if name is None:
        raise ConfigError(
            f"export=gguf does not know llama.cpp's name for how this tokenizer splits text ({_told(found)}); it knows"
            f" {', '.join(STEPS)}: export=hf or export=mlx take the tokenizer as it is"
        )
    if (name in WHOLE_WORDS) != whole and not merge_to_themselves(described):
        raise ConfigError(
            f"llama.cpp merges {'no ' if name in WHOLE_WORDS else ''}words that are tokens where text is split as"
            f" {name}, and this tokenizer does not: export=hf or export=mlx take it as it is"
        )
    return name


def listed(tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token of the model and its kind; numbers that stand for nothing are filled up."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [int(TokenType.UNUSED)] * size
    of_characters = characters.merged(described)
    for token, number in described["model"]["vocab"].items():
        tokens[number] = token
        kinds[number] = int(TokenType.BYTE if of_characters and characters.is_byte(token) else TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        kinds[number] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        if of_characters and not added.special:
            tokens[number] = added.content.replace(characters.SPACE, " ")  # it is looked for in text as it is
    if of_characters and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, kinds


def file_name(teacher: ModelFolder) -> str:
    """The model's name, by which llama.cpp decides whether special tokens swallow spaces behind them, as Phi-3's do."""
    added = {token.content: token for token in teacher.tokenizer().added_tokens_decoder.values()}
    if {"</s>", *KEPT_BEHIND} <= added.keys() and all(
        token.rstrip == (name not in KEPT_BEHIND) and not token.lstrip for name, token in added.items()
    ):
        return teacher.name if PHI_3.search(teacher.name) else f"{teacher.name} (phi-3)"
    if names := [name for name, token in added.items() if token.lstrip or token.rstrip]:
        console.say(f"llama.cpp keeps spaces beside {', '.join(names)}, which the model's tokenizer swallows")
    return PHI_3.sub("phi 3", teacher.name)


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, teacher: ModelFolder) -> None:
    """Tokens with a meaning: the tokenizer's own end first, then those that llama.cpp does not find by their names."""
    own = tokenizer.eos_token_id
    others = [end for end in teacher.ends() if end != own]
    others.sort(key=lambda end: tokenizer.convert_ids_to_tokens(end) in FOUND)
    ends = [*([own] if own is not None else []), *others]
    for name, number in zip(ENDS, ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    lost = [token for token in tokenizer.convert_ids_to_tokens(ends[len(ENDS) :]) if token not in FOUND]
    if lost:
        console.print(f"answers end in llama.cpp at {len(ENDS)} tokens and some names: not at {', '.join(lost)}")
    for name, token in (("bos", tokenizer.bos_token_id), ("unknown", tokenizer.unk_token_id)):
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
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


def _changes(normalizer: dict[str, Any] | None) -> list[str]:
    """What a tokenizer does to text before it splits it, by the types of its steps."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer["type"]]
    return [change for step in normalizer["normalizers"] for change in _changes(step)]


def _kind(model: dict[str, Any], changes: list[str]) -> str:
    if model["type"] != "BPE":
        return f"a {model['type']}"
    return f"one that changes text ({', '.join(changes)})" if changes else "one of marked words"


def _told(found: tuple[Step, ...]) -> str:
    return ", then ".join(f"{name} {value!s:.120}" for name, value in found) or "not at all"
